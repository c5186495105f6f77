"""The commands of `pbe checkpoint` for files of adapters."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from math import hypot
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.cli.errors import printable
from pbe.cli.flags import check_output

if TYPE_CHECKING:  # torch is not imported for `--help`
    from pbe.checkpoints.layouts import Model

FORMATS = ("peft", "diffusers", "kohya", "pbe")


def add_adapter_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    out = "a file ending in .safetensors, or of peft any other name: a folder as PEFT loads it"
    sub = add("convert-adapter", convert_adapter, "rewrite adapters in another format's names", "adapter", out=out)
    sub.add_argument("--to", choices=FORMATS, required=True, help="whose names (pbe: this library's own)")
    sub.add_argument("--ckpt", type=Path, help="the checkpoint that they are for (default: the released sizes)")

    help = "write what training changed of a checkpoint's UNet as adapters, nearly"
    sub = add("extract-adapter", extract_adapter, help, "base", "tuned", out=out)
    sub.add_argument("--rank", type=int, default=32, help="of the adapters: more is closer, and larger (default 32)")
    sub.add_argument("--to", choices=FORMATS, default="peft", help="whose names (default peft)")


def model_for_adapters(ckpt: Path | None) -> Model:
    """The model on the meta device that adapters are for: that in a checkpoint, or the released one."""
    from pbe.checkpoints.loading import build, open_recognised
    from pbe.checkpoints.meta_device import build_on_meta
    from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig

    return build(open_recognised(ckpt)) if ckpt else build_on_meta(PaintByExample, PaintByExampleConfig())


def inspect_adapters(args: argparse.Namespace) -> int:
    from pbe.checkpoints.adapters import read_adapter
    from pbe.io.json_text import shown
    from pbe.models.detail import sizes

    found = read_adapter(args.checkpoint, model_for_adapters(args.ckpt))
    if found.detail:
        config, tensors = found.detail
        print(printable(f"{found.path}: a detail adapter of {sum(x.numel() for x in tensors.values()):,} parameters"))
        for key, value in {**sizes(config), **found.metadata}.items():
            print(printable(f"  {key}: {shown(value)}"))
        return 0
    updates = found.updates.values()
    print(printable(f"{found.path}: adapters in {found.format} names, for {len(updates)} layers of the UNet"))
    facts: dict[str, list[Any]] = {
        "kind": [x.kind if x.magnitude is None else f"{x.kind} under DoRA" for x in updates],
        "rank": [x.rank or "none" for x in updates],
        "alpha": ["the rank" if x.alpha is None else f"{x.alpha:g}" for x in updates],
        "targets": [".".join([part for part in name.split(".") if not part.isdigit()][-2:]) for name in found.updates],
    }
    for name, values in facts.items():
        print(f"  {name}: " + ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common()))
    for key, value in found.metadata.items():
        print(printable(f"  {key}: {shown(value)}"))
    if found.text:
        print(f"  not loaded: {found.text} tensors (a text encoder's)")
    return 0


def convert_adapter(args: argparse.Namespace) -> int:
    from pbe.checkpoints.adapter_writing import write_adapter
    from pbe.checkpoints.adapters import read_adapter

    check_output(args)
    model = model_for_adapters(args.ckpt)
    found = read_adapter(args.adapter, model)
    write_adapter(found, args.out, args.to, model=model, overwrite=args.force)
    if found.text:
        print(printable(f"{args.adapter}: {found.text} tensors of a text encoder are left out"), file=sys.stderr)
    return 0


def extract_adapter(args: argparse.Namespace) -> int:
    from pbe.checkpoints import adapter_extraction
    from pbe.checkpoints.adapter_writing import check_adapter_path, write_adapter
    from pbe.checkpoints.loading import build, open_recognised

    check_output(args)
    check_adapter_path(args.out, args.to)
    norms: list[tuple[float, float]] = []

    def tell(layer: str, missed: float, difference: float) -> None:
        norms.append((missed, difference))
        print(f"{missed / difference:14.4f}  {difference:10.4g}  {layer}", flush=True)

    print("relative error  difference  layer")
    tuned = open_recognised(args.tuned)
    adapter = adapter_extraction.extract_adapter(open_recognised(args.base), tuned, args.rank, tell)
    write_adapter(adapter, args.out, args.to, model=build(tuned), overwrite=args.force)
    missed, difference = (hypot(*column) for column in zip(*norms, strict=True))
    print(f"{missed / difference:14.4f}  {difference:10.4g}  all {len(norms)} layers")
    return 0
