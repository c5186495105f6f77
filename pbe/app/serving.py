"""Serving the page: at an address, with its warnings in the browser and its files in a folder of its own."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import gradio as gr
from gradio.context import LocalContext
from PIL import Image
from starlette.middleware import Middleware

from pbe.images.pillow import PictureWarning
from pbe.io.atomic import is_running
from pbe.serve.engine import Engine, Ticket
from pbe.serve.guard import Guard

T = TypeVar("T")
MAX_UPLOAD = 64 * 2**20
MAX_WAITING = 16  # edits in the queue; one runs at a time
UNREAD = 30  # seconds after which a client that has not read its messages has left
# The fonts come with Gradio: none is fetched from elsewhere. Its semi-bold files lack letters.
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="stone",
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"],
).set(body_text_color_subdued="*neutral_500")  # Gradio's own is too light to read


def serve(
    page: gr.Blocks,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    allow_hosts: tuple[str, ...] = (),
    files: Path | None = None,
) -> str:
    """Serves a page of `build_page` in threads of its own; returns its address.

    auth: the user and password that a visitor must give.
    allow_hosts, files: see `pbe.serve.guard`; the latter is that of `files_of_page`.

    ValueError for an impossible port number; OSError if the port is taken, or `host` is not this machine's.

    Nothing is sent to or fetched from anywhere else. `page.block_thread()` waits until it is interrupted.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"port must be between 1 and 65535, got {port}")
    try:
        _, address, _ = page.queue(max_size=MAX_WAITING).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=["api"],
            max_file_size=MAX_UPLOAD,
            auth=auth,
            show_error=True,
            enable_monitoring=False,
            app_kwargs={"middleware": [Middleware(Guard, MAX_UPLOAD, host, allow_hosts, files)]},
            theme=THEME,
            css_paths=Path(__file__).with_name("page.css"),
        )
    except OSError as error:  # its text names Gradio's own settings
        raise OSError(f"cannot serve at {host}:{port}: the port is taken, or the host is not this machine's") from error
    return address


@contextmanager
def warnings_on_page() -> Iterator[None]:
    """Shows the library's warnings about pictures, each time, in the browser whose edit they are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # other packages' deprecations: nothing a user can act on
        warnings.simplefilter("always", PictureWarning)
        show = warnings.showwarning

        def showwarning(message: Warning | str, category: type[Warning], *where: Any, **named: Any) -> None:
            if issubclass(category, PictureWarning):
                gr.Warning(str(message))
            else:
                show(message, category, *where, **named)

        warnings.showwarning = showwarning
        yield


@contextmanager
def files_of_page() -> Iterator[Path]:
    """Keeps all temporary files in a folder of their own; yields that in it of the pages built within.

    It is deleted at the end, and with it those of pages whose processes were killed.
    """
    before, base = os.environ.get("GRADIO_TEMP_DIR"), tempfile.gettempdir()
    prefix = f"pbe-page-{socket.gethostname()}-"
    for name in os.listdir(base):
        process = re.fullmatch(re.escape(prefix) + r"(\d{1,9})-\w+", name)
        if process and not is_running(int(process[1])):
            shutil.rmtree(Path(base, name), ignore_errors=True)
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)  # for an edit that ends after the page
    os.environ["GRADIO_TEMP_DIR"] = str(Path(tempfile.tempdir, "files"))  # Gradio has no other way to say it
    try:
        yield Path(tempfile.tempdir, "files")
    finally:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        tempfile.tempdir = base
        del os.environ["GRADIO_TEMP_DIR"]
        os.environ.update({} if before is None else {"GRADIO_TEMP_DIR": before})


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder for one edit; the library's errors become messages on the page, without the folder's name."""
    with tempfile.TemporaryDirectory(prefix="pbe-") as folder:
        try:
            yield Path(folder)
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(str(error).replace(f"{folder}/", ""), print_exception=False) from error


def followed(
    engine: Engine, edit: Ticket[T], progress: gr.Progress, show: Callable[[list[Image.Image]], Any] | None = None
) -> Generator[Any, None, T]:
    """Has an edit made, and yields what `show` makes of its previews; returns what it does, and raises what it raises.

    It ends at its next step once nobody waits for it, or the generator is closed.
    """
    check, news, shown = waiting_client(), Event(), edit.preview
    edit.changed = news.set
    engine.submit(edit)
    try:
        while not edit.future.done():
            news.wait(1)
            news.clear()
            check()
            if edit.total:
                progress((edit.done, edit.total), desc="Painting")
            if show is not None and edit.preview is not shown:
                shown = edit.preview
                yield show(shown)
    finally:
        edit.cancel()
    return edit.future.result()


CANCELLED: set[str] = set()  # the visitors who pressed Cancel since their last edit began


def cancel_edit(request: gr.Request) -> object:
    """Has `waiting_client` end the visitor's edit; hides its preview."""
    CANCELLED.add(str(request.session_hash))
    return gr.Gallery(visible=False)


def waiting_client() -> Callable[[], None]:
    """A function that raises `gr.Error` once nobody waits any longer for the edit that this thread follows: it was
    cancelled, its client has left or the page has ended. Gradio itself lets the edit run on."""
    page, edit = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    oldest, since = None, time.monotonic()
    if page is not None and edit is not None and (begun := page._queue.event_ids_to_events.get(edit)):
        CANCELLED.discard(begun.session_hash)

    def check() -> None:
        nonlocal oldest, since
        if page is None or edit is None:
            return  # an edit without a page
        queue = page._queue  # the only place that knows
        event = queue.event_ids_to_events.get(edit)
        messages = queue.pending_messages_per_session.get(event.session_hash) if event else None
        unread = [] if messages is None else list(messages._queue)
        if not unread or unread[0] is not oldest:
            oldest, since = next(iter(unread), None), time.monotonic()
        is_wanted = event is not None and event.alive and messages is not None and time.monotonic() - since < UNREAD
        is_cancelled = event and event.session_hash in CANCELLED
        if queue.stopped or is_cancelled or not is_wanted:
            raise gr.Error("The edit was cancelled: nobody waits for it.", print_exception=False)

    return check
