"""`pbe serve`: serve edits to programs over HTTP, as OpenAI's endpoint for edits of images and with all settings."""

from __future__ import annotations

import os
from pathlib import Path

from pbe.cli.edit import one_line_warnings
from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_model, files_beside, flag, load_for
from pbe.io.atomic import locked
from pbe.io.fields import field_docs, field_types, read
from pbe.serve.limits import Limits


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    add_model(p, positional=True)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1; 0.0.0.0: all)")
    p.add_argument("--port", type=int, default=8000, help="default 8000")
    p.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the token that clients must send, which PBE_TOKEN in the environment may be as well; needed for a "
        "--host other than this machine",
    )
    p.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of this host")
    p.add_argument(
        "--files", type=Path, default=Path("serve-files"), metavar="FOLDER", help="of jobs (default: %(default)s)"
    )
    for name, about in field_docs(Limits).items():
        p.add_argument(flag(name), metavar="N", help=f"{about[:-1]} (default: {getattr(Limits, name)})")
    return p


def token_of(file: Path | None, is_open: bool) -> str | None:
    """The token of --token-file or PBE_TOKEN; ValueError where there is none, but must be."""
    token = (file.read_text("utf-8") if file else os.environ.get("PBE_TOKEN", "")).strip()
    if not token.isascii() or (not token and (file is not None or is_open)):
        what = f"--token-file {file} holds no token" if file else "other machines reach this --host"
        raise ValueError(f"{what}: give one of ASCII characters, by --token-file FILE or PBE_TOKEN")
    return token or None


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is interrupted; returns the exit code."""
    args = parser(prog).parse_args(argv)
    from pbe.batch.provenance import identify
    from pbe.checkpoints.formats.opening import open_checkpoint
    from pbe.editing.settings import quick_settings
    from pbe.serve.api import build_api  # first: without the extra it says so
    from pbe.serve.guard import is_loopback
    from pbe.serve.serving import serve

    given = {name: (getattr(args, name), kind) for name, kind in field_types(Limits).items() if getattr(args, name)}
    limits = Limits(**{name: read(flag(name), *values) for name, values in given.items()})
    token = token_of(args.token_file, not is_loopback(args.host))
    open_checkpoint(args.ckpt)  # what cannot be opened leaves no folder
    args.files.mkdir(parents=True, exist_ok=True)
    with one_line_warnings(), locked(args.files / ".lock", f"another server has its jobs in {args.files}"):
        model = load_for(args)
        weights = identify(args.ckpt, model.dtype, *files_beside(args))
        names = args.host, tuple(args.allow_host)
        serve(
            build_api(model, weights, args.files, quick_settings(args.ckpt), limits, token, *names),
            args.host,
            args.port,
        )
    return 0
