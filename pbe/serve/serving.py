"""Serving the API at an address."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Ends at SIGTERM and Ctrl+C, when it hands back what waits; a second Ctrl+C does not wait for what runs."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.api.engine.hand_back()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def configured(app: FastAPI, host: str, port: int) -> tuple[uvicorn.Config, socket.socket]:
    """How what `build_api` made is served, and the socket that listens; port 0 is any that is free.

    OSError if the port is taken, or `host` is not this machine's; OverflowError for an impossible port number.
    """
    address = host.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=2048)
    grace = app.state.api.limits.grace
    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace, server_header=False), listener


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serves until a signal asks for the end; says where. Raises as `configured`."""
    config, listener = configured(app, host, port)
    with listener:
        shown = f"[{host.strip('[]')}]" if ":" in host else host
        print(f"serving at http://{shown}:{listener.getsockname()[1]} (Ctrl+C ends it)", flush=True)
        Server(config).run([listener])
