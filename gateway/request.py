"""Builds the chat request to the gateway, and the key by which the gateway knows a conversation."""

from collections.abc import Sequence
from typing import NamedTuple


class ChatRequest(NamedTuple):
    """Headers and JSON body of a request to the gateway's chat endpoint."""

    headers: dict[str, str]
    body: dict[str, object]


def agent_session(agent_id: str, session_key: str) -> str:
    """Returns the gateway's key of a conversation, which is what the gateway derives from `user` in lower case."""
    return f"agent:{agent_id}:openai-user:adapter-session-{session_key}".lower()


def build_request(
    *,
    agent_id: str,
    session_key: str,
    project: tuple[str, str | None, str],
    text: str,
    images: Sequence[dict[str, object]],
) -> ChatRequest:
    """Builds the request for a turn, with or without images, whether or not the client receives a stream.

    `user` and the header name the same conversation, so the conversation continues if a gateway reads only one of
    them. The gateway keeps the history: the request contains only the new message, and a system message about the
    project (name, description, folder). `images` are OpenAI content parts.
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
