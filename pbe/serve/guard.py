"""What a server asks of a request before it is read: whose it is, how large, and whether there is room."""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORM = 2**16  # bytes that a form may add to the file in it
DRAINED = 2**30  # bytes of a refused body that are read: a client that still sends does not see the answer
MAX_STORED = 4 * 2**30  # bytes of all uploads and results
MIN_STORED = 2**16  # what a file counts at least: going through many small ones takes time


class Guard:
    """ASGI middleware. Requests to foreign hosts and from foreign origins are refused, so that no other site can use
    this one through a visitor's browser; so are bodies above the limit. What the application fails on is answered.

    limit: bytes of a body, beside those of a form.
    host, allowed: the names that the server has beside the address at which a connection arrives.
    files: the folder of uploads and results, of which the oldest are deleted where there are too many.
    """

    def __init__(self, app: ASGIApp, limit: int, host: str, allowed: tuple[str, ...] = (), files: Path | None = None):
        self.app, self.limit, self.files = app, limit, files
        self.host, self.allowed = host.strip("[]").lower(), {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            refusal = self.refusal(scope) if scope["type"] == "http" else None
            if refusal is None:
                if self.files is not None and scope.get("method") == "POST":
                    await asyncio.to_thread(make_room, self.files)
                await self.app(scope, receive, answer)
                return
            status, message = refusal
            received, more = 0, True
            while more and received < DRAINED:
                part = await receive()
                received, more = received + len(part.get("body", b"")), part.get("more_body", False)
        except Exception as error:
            if answered:
                raise
            status, message = self.failed(error)
        await self.refused(status, message)(scope, receive, send)

    def failed(self, error: Exception) -> tuple[int, str]:
        """The HTTP status and the message for what the application fails on."""
        return 400, f"this request cannot be answered: {type(error).__name__}: {error}"

    def refused(self, status: int, message: str) -> JSONResponse:
        return JSONResponse({"detail": message}, status)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The HTTP status and the reason for a request that is refused."""
        headers, address = Headers(scope=scope), scope["server"][0].removeprefix("::ffff:")
        own = self.allowed | {self.host, address} | ({"localhost"} if is_loopback(address) else set())
        host, origin = ", ".join(headers.getlist("host")), headers.get("origin")
        if hostname(host) not in own:
            return 403, f"the host {host!r} is not this server's; --allow-host NAME makes it so"
        # An origin with its port: another server of the same machine is another site.
        netloc = (origin or "").partition("://")[2]
        if origin is not None and netloc != host and hostname(netloc) not in self.allowed:
            return 403, f"the origin {origin!r} is not this server's; --allow-host NAME makes it so"
        return self.oversize(headers)

    def oversize(self, headers: Headers) -> tuple[int, str] | None:
        """As `refusal`, for a body that is too large, or might be."""
        if "transfer-encoding" in headers:
            return 411, "the request does not say its length: send Content-Length"
        if int(headers.get("content-length", 0)) > self.limit + FORM:
            return 413, f"the request is too large: files of up to {self.limit / 2**20:g} MB are taken here"
        return None


def hostname(netloc: str) -> str:
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_room(folder: Path) -> None:
    """Deletes the oldest files until the rest takes MAX_STORED bytes."""
    files = [(path.stat(), path) for path in folder.rglob("*") if path.is_file()]
    total = 0
    for status, path in sorted(files, key=lambda file: -file[0].st_mtime):
        total += max(status.st_size, MIN_STORED)
        if total > MAX_STORED:
            path.unlink(missing_ok=True)
