"""Serving the page: at an address, with its warnings in the browser and its files in a folder of its own."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from pbe.images.pillow import PictureWarning

MAX_UPLOAD = "64mb"
MAX_WAITING = 16  # edits in the queue; one runs at a time
# The fonts come with Gradio: none is fetched from elsewhere. Its semi-bold files lack letters.
THEME = gr.themes.Base(
    primary_hue="indigo",
    neutral_hue="stone",
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"],
)


def serve(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serves a page of `build_page` in threads of its own; returns its address.

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
def files_of_page() -> Iterator[None]:
    """Keeps uploads and results of the pages built within in a folder of their own, which is deleted at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="pbe-page-", dir=before) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # Gradio has no other way to say it
        try:
            yield
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            os.environ.update({} if before is None else {"GRADIO_TEMP_DIR": before})
