"""The client of OpenClaw, the gateway to the AI agent: builds requests, parses answers, translates failures.

`build_request` is the only builder of chat requests and `Gateway` the only client. No other room talks to OpenClaw.
"""

from .client import Gateway, State, WebSocketState
from .completions import NO_REPLY, Chunk, CompletionReader, EventReader
from .history import Finished, Period, find_reply
from .request import ChatRequest, agent_session, build_request

__all__ = [
    "NO_REPLY",
    "ChatRequest",
    "Chunk",
    "CompletionReader",
    "EventReader",
    "Finished",
    "Gateway",
    "Period",
    "State",
    "WebSocketState",
    "agent_session",
    "build_request",
    "find_reply",
]
