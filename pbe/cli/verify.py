"""`pbe verify`: whether this library computes with a checkpoint what diffusers does. Needs the extra `verify`.

What it prints is a block to paste into an issue; the exit code is 1 where the two differ.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pbe
from pbe.cli.errors import one_line_errors, printable
from pbe.cli.flags import Parser


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, help="of Paint by Example: a file, a diffusers folder, or hf:OWNER/NAME")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Compares, and prints the block; returns the exit code."""
    args = parser(prog).parse_args(argv)
    from pbe.checkpoints.formats.opening import find_checkpoint
    from pbe.checkpoints.loading import open_recognised
    from pbe.checkpoints.surgery import describe
    from pbe.evaluation.markdown import table
    from pbe.evaluation.parity import compare_with_diffusers
    from pbe.io.checksums import sha256_of

    path = find_checkpoint(args.checkpoint)
    print("running every network twice: a model of full size takes minutes", file=sys.stderr)
    found = compare_with_diffusers(path)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    print(f"pbe {pbe.__version__}, {packages}, Python {platform.python_version()}, {platform.platform()}\n")
    files = [file for file in sorted(path.glob("*/*")) if file.suffix in (".safetensors", ".bin")] or [path]
    for file in files:
        print(printable(f"- {file.relative_to(path.parent)}: {file.stat().st_size} bytes, sha256 {sha256_of(file)}"))
    about = describe(open_recognised(path))
    print(f"- {about['layout']}, {', '.join(about['dtypes'])}\n- {about['config']}\n")
    rows = [(one.output, *(f"{x:.2e}" for x in one[1:]), "yes" if one.agrees else "NO") for one in found]
    print(table(("output", "largest difference", "relative", "limit", "agrees"), rows))
    differing = ", ".join(one.output for one in found if not one.agrees)
    print(f"\nThe two differ in {differing}." if differing else "\nThe two agree.")
    return 1 if differing else 0
