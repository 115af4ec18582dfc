"""The one builder of requests to the gateway, and its name of a conversation."""

from collections.abc import Sequence
from typing import NamedTuple


class ChatRequest(NamedTuple):
    """One message for the agent, as the gateway wants it."""

    headers: dict[str, str]
    body: dict[str, object]


def agent_session(agent_id: str, session_key: str) -> str:
    """The gateway's own name of a conversation: what it makes of `user`, which it lower-cases."""
    return f"agent:{agent_id}:openai-user:adapter-session-{session_key}".lower()


def build_request(
    *,
    agent_id: str,
    session_key: str,
    project: tuple[str, str | None, str],
    text: str,
    images: Sequence[dict[str, object]],
) -> ChatRequest:
    """The one request there is, for text and images, streamed to the client or not.

    `user` and the header name the same conversation, so it is continued whichever of them a gateway heeds.
    The gateway keeps the history: only the new message goes out, with a word on the project (name,
    description, folder) for the system prompt. `images` are content parts.
    """
    name, description, folder = project
    system = f"This conversation belongs to the project {name!r}."
    if description:
        system += f" Its description: {description}"
    if folder:
        system += f"\nThe project's folder is {folder} : read and write its files there."
    content: object = [*([{"type": "text", "text": text}] if text else []), *images] if images else text
    return ChatRequest(
        headers={"x-openclaw-session-key": agent_session(agent_id, session_key)},
        body={
            "model": f"agent:{agent_id}",
            "user": f"adapter-session-{session_key}",
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
