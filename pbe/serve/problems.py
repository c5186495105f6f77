"""Errors as a client of the server gets them, in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.exceptions import HTTPException

from pbe.serve.engine import Cancelled, Closed, Full, TooLong

# What an exception is for a client, the first that fits: HTTP status, code, and the message where it has none.
KINDS: dict[type[Exception], tuple[int, str, str | None]] = {
    Full: (429, "queue_full", "the queue is full: ask again later"),
    Closed: (503, "shutting_down", "the server is being stopped: ask again later"),
    Cancelled: (409, "cancelled", "the edit was cancelled"),
    TooLong: (504, "too_long", "the edit took longer than this server allows: take fewer steps or results"),
    ValueError: (400, "invalid_value", None),
    MemoryError: (507, "memory_full", None),
    OSError: (507, "storage", None),
    Exception: (500, "internal_error", "internal error"),
}
TYPES = {429: "rate_limit_error"} | dict.fromkeys((500, 503, 504, 507), "server_error")
CODES = {401: "invalid_api_key", 404: "not_found", 411: "no_length", 413: "too_large", 500: "internal_error"}


class Problem(HTTPException):
    """What the answer to a request says is wrong; `param` is the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers or ({"WWW-Authenticate": "Bearer"} if status == 401 else None))
        type_, code = TYPES.get(status, "invalid_request_error"), code or CODES.get(status)
        self.error = {"message": message, "type": type_, "param": param, "code": code}

    @classmethod
    def of(cls, error: Exception, folder: Path | None = None, names: Iterable[str] = ()) -> Problem:
        """The problem that an exception is, without its folder's name. One that nobody foresaw goes to the log alone.

        names: of fields, with one of which a message may begin.
        """
        if isinstance(error, Problem):
            return error
        if isinstance(error, HTTPException):
            return cls(error.status_code, str(error.detail), headers=error.headers)
        kind, (status, code, message) = next(item for item in KINDS.items() if isinstance(error, item[0]))
        if kind is Exception:
            logging.getLogger(__name__).error("an edit failed", exc_info=error)
        message = message or str(error).replace(f"{folder}/", "")
        param = next((name for name in names if kind is ValueError and message.split()[:1] == [name]), None)
        seconds = error.args[0] if kind is Full else 5 if kind is Closed else None
        return cls(status, message, param, code, {"Retry-After": str(seconds)} if seconds else None)
