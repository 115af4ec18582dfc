"""OpenClaw, the gateway: what is asked of it, how its answers are read, and what its failures mean.

There is one builder of requests (`build_request`) and one client (`Gateway`). Nothing else speaks to it.
"""

from .client import Gateway, State
from .completions import NO_REPLY, CompletionReader, EventReader
from .request import ChatRequest, agent_session, build_request
from .rpc import find_reply

__all__ = [
    "NO_REPLY",
    "ChatRequest",
    "CompletionReader",
    "EventReader",
    "Gateway",
    "State",
    "agent_session",
    "build_request",
    "find_reply",
]
