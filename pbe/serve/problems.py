"""Errors as a client of the server gets them, in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pbe.serve.engine import Cancelled, Closed, Full, TooLong

# What an exception is for a client, the first that fits: HTTP status, OpenAI's type, code, a message if it has none.
KINDS: dict[type[Exception], tuple[int, str, str, str | None]] = {
    Full: (429, "rate_limit_error", "queue_full", "the queue is full: ask again later"),
    Closed: (503, "server_error", "shutting_down", "the server is being stopped: ask again later"),
    Cancelled: (409, "invalid_request_error", "cancelled", "the edit was cancelled"),
    TooLong: (
        504,
        "server_error",
        "too_long",
        "the edit took longer than this server allows: take fewer steps or results",
    ),
    ValueError: (400, "invalid_request_error", "invalid_value", None),
    MemoryError: (507, "server_error", "memory_full", None),
    OSError: (507, "server_error", "storage", None),
    Exception: (500, "server_error", "internal_error", "internal error"),
}
CODES = {401: "invalid_api_key", 404: "not_found", 411: "no_length", 413: "too_large", 500: "internal_error"}


@dataclass(eq=False)
class Problem(Exception):
    """What the answer to a request says is wrong, and its HTTP status; `param` is the field that it is about."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None  # seconds

    @classmethod
    def of(cls, error: Exception, folder: Path | None = None, names: Iterable[str] = ()) -> Problem:
        """The problem that an exception is, without its folder's name. One that nobody foresaw goes to the log alone.

        names: of fields, with one of which a message may begin.
        """
        if isinstance(error, Problem):
            return error
        kind, (status, type_, code, message) = next(item for item in KINDS.items() if isinstance(error, item[0]))
        if kind is Exception:
            logging.getLogger(__name__).error("an edit failed", exc_info=error)
        message = message or str(error).replace(f"{folder}/", "")
        param = next((name for name in names if kind is ValueError and message.split()[:1] == [name]), None)
        retry_after = error.args[0] if kind is Full else 5 if kind is Closed else None
        return cls(status, message, type_, param, code, retry_after)

    @classmethod
    def http(cls, status: int, message: str) -> Problem:
        """The problem of an HTTP status."""
        type_ = "server_error" if status >= 500 else "invalid_request_error"
        return cls(status, message, type_, None, CODES.get(status))

    @property
    def detail(self) -> dict[str, Any]:
        """What a client sees."""
        return {name: value for name, value in asdict(self).items() if name not in ("status", "retry_after")}

    @property
    def headers(self) -> dict[str, str]:
        return {
            **({"Retry-After": str(self.retry_after)} if self.retry_after else {}),
            **({"WWW-Authenticate": "Bearer"} if self.status == 401 else {}),
        }
