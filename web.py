"""HTTP of no feature: what requests have in common."""

import asyncio
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi import Path as PathParam
from pydantic import BaseModel, model_validator

import gateway
import image_handler
import sql
from database import Database
from settings import Settings
from turns import Turns

Id = Annotated[int, PathParam(ge=1, le=sql.MAX_ID)]


class Body(BaseModel):
    """A request's JSON object. Text with half a character in it (a lone surrogate) is refused, wherever it is:
    neither SQLite nor a file nor the gateway takes it."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_half_characters(cls, data: object) -> object:
        waiting = [data]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str):
                _check_unicode(value)
        return data


def _check_unicode(text: str) -> None:
    try:
        if not text.isascii():  # pictures are, and long
            text.encode()
    except UnicodeEncodeError:
        raise ValueError("there is text in it that is no valid Unicode") from None


@dataclass(frozen=True, slots=True)
class Parts:
    """The opened parts of one running service."""

    settings: Settings
    db: Database
    openclaw: gateway.Gateway
    images: image_handler.ImageStore
    decoding: asyncio.Semaphore  # pictures of so many messages at once: one can take a gigabyte
    turns: Turns


async def _parts(request: Request) -> Parts:
    return cast(Parts, request.state.parts)


OpenParts = Annotated[Parts, Depends(_parts)]
