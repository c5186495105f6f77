"""What the page's server asks of a request before Gradio sees it: whose it is, how large, and whether there is room."""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FORM = 2**16  # bytes that a form may add to the file in it
DRAINED = 2**30  # bytes of a refused body that are read: a client that still sends does not see the answer
MAX_STORED = 4 * 2**30  # bytes of all uploads and results
MIN_STORED = 2**16  # what a file counts at least: going through many small ones takes time


class Guard:
    """ASGI middleware. Requests to foreign hosts and from foreign origins are refused, so that no other site can use
    this page through a visitor's browser; so are bodies above the page's limit. What Gradio fails on is answered.

    host, allowed: the names that the page has beside the address at which a connection arrives.
    files: the folder of uploads and results, of which the oldest are deleted where there are too many.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, host: str, allowed: tuple[str, ...], files: Path | None):
        self.app, self.page, self.files = app, page, files
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
            status, message = 400, f"this request cannot be answered: {type(error).__name__}: {error}"
        await JSONResponse({"detail": message}, status)(scope, receive, send)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The HTTP status and the reason for a request that is refused."""
        headers, address = Headers(scope=scope), scope["server"][0].removeprefix("::ffff:")
        own = self.allowed | {self.host, address} | ({"localhost"} if is_loopback(address) else set())
        host, origin = ", ".join(headers.getlist("host")), headers.get("origin")
        if hostname(host) not in own:
            return 403, f"the host {host!r} is not this page's; --allow-host NAME makes it so"
        # An origin with its port: another server of the same machine is another site.
        netloc = (origin or "").partition("://")[2]
        if origin is not None and netloc != host and hostname(netloc) not in self.allowed:
            return 403, f"the origin {origin!r} is not this page's; --allow-host NAME makes it so"
        if "transfer-encoding" in headers:
            return 411, "the request does not say its length: send Content-Length"
        limit = self.page.max_file_size or 0
        if int(headers.get("content-length", 0)) > limit + FORM:
            return 413, f"the request is too large: this page takes files of up to {limit / 2**20:g} MB"
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
