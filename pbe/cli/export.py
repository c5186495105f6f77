"""`pbe export`: write a model's networks for another runtime, and edit with them by --ckpt FOLDER."""

from __future__ import annotations

from pathlib import Path

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_adapter, add_force, check_output


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    p.add_argument("ckpt", type=Path, metavar="CKPT", help="a checkpoint, a folder of diffusers, or demo")
    help = "onnx: files for ONNX Runtime and others, needs the extra export; torch-export: programs of torch.export"
    p.add_argument("--to", choices=("onnx", "torch-export"), required=True, help=help)
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    add_adapter(p)
    add_force(p)
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Writes the folder; returns the exit code."""
    args = parser(prog).parse_args(argv)
    check_output(args)
    import torch

    from pbe.batch.provenance import identify
    from pbe.checkpoints.loading import load_model
    from pbe.export import export_model
    from pbe.models.paint_by_example import PaintByExample

    model = load_model(args.ckpt, "cpu", torch.float32, args.adapter)
    if not isinstance(model, PaintByExample):
        raise ValueError(f"{args.ckpt} holds {type(model).__name__}; only Paint by Example is exported")
    source = identify(args.ckpt, torch.float32, args.adapter)
    export_model(model, args.out, args.to, source._asdict(), args.force)
    return 0
