"""The client of OpenClaw, the gateway to the AI agent: builds requests, parses answers, translates failures.

`build_request` is the only builder of chat requests and `Gateway` the only client. No other room talks to OpenClaw.
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
