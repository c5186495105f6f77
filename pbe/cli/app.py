"""`pbe app`: serve a page on which photos are edited by hand."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import NoReturn

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_model, files_beside, load_for
from pbe.editing.loading import AdaptedModels
from pbe.io.signals import handling


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    add_model(p, default=Path("demo"))
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1; 0.0.0.0: for the whole network)"
    )
    p.add_argument("--port", type=int, default=7860, help="default 7860")
    p.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this page's host")
    p.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="what a visitor must give; @FILE: as a file says, or in the environment as PBE_AUTH, since others see a "
        "command line; needed for a --host other than this machine, unless --no-auth is given",
    )
    p.add_argument("--no-auth", action="store_true", help="let everybody in who reaches --host")
    return p


def credentials(auth: str | None, no_auth: bool, is_open: bool) -> tuple[str, str] | None:
    """The user and password of --auth or PBE_AUTH; ValueError where there are none, but must be."""
    if no_auth and auth is not None:
        raise ValueError("give --auth or --no-auth, not both")
    text = os.environ.get("PBE_AUTH", "") if auth is None else auth
    if no_auth or not (text or is_open or auth is not None):
        return None
    if text.startswith("@"):
        if not Path(text[1:]).is_file():
            raise ValueError(f"--auth {text}: there is no such file")
        text = Path(text[1:]).read_bytes()[:10_000].decode(errors="replace")
    user, _, password = text.strip().partition(":")
    if not (user.strip() and password):
        what = "--auth is not user:password" if text else "other machines reach this --host"
        raise ValueError(f"{what}: give --auth user:password, --auth @FILE or PBE_AUTH=user:password, or --no-auth")
    return user.strip(), password


def interrupt(number: int, _: object) -> NoReturn:
    """Ctrl+C, at another signal too; a second one, which `timeout` sends, does not end the ending."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Serves the page until it is interrupted; returns the exit code."""
    args = parser(prog).parse_args(argv)
    from pbe.app.page import build_page
    from pbe.app.serving import files_of_page, serve, warnings_on_page
    from pbe.batch.provenance import identify
    from pbe.checkpoints.loading import choose_device
    from pbe.editing.settings import quick_settings
    from pbe.serve.guard import is_loopback

    if args.compile == "whole" and choose_device(args.device).type == "cuda":
        raise ValueError("--compile whole makes CUDA graphs, which one thread alone can replay: use --compile regions")
    auth = credentials(args.auth, args.no_auth, not is_loopback(args.host))
    models, adapters = AdaptedModels(partial(load_for, args)), tuple(args.adapter)
    dtype = models(adapters).dtype
    ends = handling(interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with ends, files_of_page() as files, warnings_on_page():
        weights = identify(args.ckpt, dtype, *files_beside(args))
        page = build_page(models, weights, quick_settings(args.ckpt), adapters)
        address = serve(page, args.host, args.port, auth, tuple(args.allow_host), files)
        print(f"serving at {address} (Ctrl+C ends it)", flush=True)
        page.block_thread()
        page.close(verbose=False)
    return 0
