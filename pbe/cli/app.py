"""`pbe app`: serve a page on which photos are edited by hand."""

from __future__ import annotations

from pathlib import Path

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_model, load_for


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    add_model(p, default=Path("demo"))
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1; 0.0.0.0: for the whole network)"
    )
    p.add_argument("--port", type=int, default=7860, help="default 7860")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Serves the page until it is interrupted; returns the exit code."""
    args = parser(prog).parse_args(argv)
    from pbe.app.page import build_page
    from pbe.app.serving import files_of_page, serve, warnings_on_page
    from pbe.batch.provenance import identify
    from pbe.checkpoints.loading import choose_device
    from pbe.editing.settings import quick_settings

    if args.compile == "whole" and choose_device(args.device).type == "cuda":
        raise ValueError("--compile whole makes CUDA graphs, which one thread alone can replay: use --compile regions")
    model = load_for(args)
    with files_of_page(), warnings_on_page():
        page = build_page(model, identify(args.ckpt, model.dtype), quick_settings(args.ckpt))
        print(f"serving at {serve(page, args.host, args.port)} (Ctrl+C ends it)", flush=True)
        page.block_thread()
    return 0
