"""`pbe checkpoint`: look into checkpoints and change them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.cli.adapters import add_adapter_commands, inspect_adapters
from pbe.cli.errors import one_line_errors, printable
from pbe.cli.flags import Parser, Renamed
from pbe.editing.loading import adapter

if TYPE_CHECKING:  # torch is not imported for `--help`
    from torch import Tensor

    Contents = tuple[dict[str, Tensor], dict[str, Any]]  # a file's tensors under the original keys, and its entry `pbe`

DTYPES = ("float32", "bfloat16", "float16")
A_FILE = "a file ending in .safetensors or .ckpt"


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], help: str, *paths: str, out: str | None = A_FILE
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        for path in paths:
            sub.add_argument(path, type=Path)
        if out:
            sub.add_argument("--out", type=Path, required=True, help=out)
            sub.add_argument("--force", action="store_true", help="replace an existing output")
        return sub

    sub = add("inspect", inspect, "say what a checkpoint, or a file of adapters, holds", "checkpoint", out=None)
    sub.add_argument("--ckpt", type=Path, help="the checkpoint that adapters are for (default: the released sizes)")

    help = "give Stable Diffusion v1 (or its inpainting model) Paint by Example's nine inputs"
    sub = add("expand", partial(write, expand), help, "checkpoint")
    help = "a CLIP ViT-L/14, or its vision tower: put it and a fresh mapper in the text tower's place, ready to train"
    sub.add_argument("--clip", type=Path, help=help)
    sub.add_argument("--seed", type=int, default=0, help="of the fresh mapper (default 0)")

    for name, help in (
        ("slim", "keep the networks alone: no optimizer, no averaged copies"),
        ("extract-ema", "put the averaged copies in the place of the parameters"),
    ):
        sub = add(name, partial(write, rewrite), help, "checkpoint")
        sub.add_argument("--dtype", choices=DTYPES, help="convert to this precision (default: as it is)")
        if name == "slim":
            help = "of a CLIP whose file does not say it: gelu for most of open_clip's"
            sub.add_argument("--activation", choices=("quick_gelu", "gelu"), help=help)

    help = f"{A_FILE}, or any other name: a diffusers folder"
    add("convert", convert, "rewrite a checkpoint in another format", "checkpoint", out=help)

    sub = add("diff", diff, "list how two checkpoints differ; exit code 1 if they do", "a", "b", out=None)
    sub.add_argument("--tolerance", type=float, default=0.0, help="ignore differences of values up to this (default 0)")

    sub = add("merge", partial(write, merge), "write the weighted sum of checkpoints, or A + W (B - C)")
    sub.add_argument("checkpoints", type=Path, nargs="+")
    help = "one per checkpoint, adding up to 1; with --add-difference W alone (default 1)"
    sub.add_argument("--weights", "--weight", type=float, nargs="+", metavar="W", help=help)
    help = "A + W (B - C) of three checkpoints: a fine-tune B of Stable Diffusion C, carried over to Paint by Example A"
    sub.add_argument("--add-difference", action="store_true", help=help)
    help = "other weights for one network that `inspect` lists (unet, clip-vision, …), as many as --weights; repeatable"
    sub.add_argument("--part", type=part, action="append", default=[], metavar="PART=W[,W…]", help=help)

    help = "make adapters, our own and others', part of a checkpoint's weights"
    sub = add("merge-adapter", partial(write, merge_adapter), help, "checkpoint")
    sub.add_argument("adapters", type=adapter, nargs="+", metavar="FILE[:STRENGTH]", help="strength: 1 if not given")
    new = "merge-adapter CHECKPOINT FILE[:STRENGTH]… --out FILE"
    commands.add_parser("merge-lora").add_argument("arguments", nargs=argparse.REMAINDER, action=Renamed, new=new)

    add_adapter_commands(add)

    help = "put another autoencoder in the place of this checkpoint's, or where it has none"
    sub = add("set-vae", partial(write, set_vae), help, "checkpoint")
    sub.add_argument("vae", type=Path, help="one of the same sizes: a file or folder of its own, or a model's")

    help = "put TAESD's decoder beside the autoencoder, in the place of its own tiny decoder if it has one"
    sub = add("set-tiny-decoder", partial(write, set_tiny_decoder), help, "checkpoint")
    sub.add_argument("tiny_decoder", type=Path, help="a taesd_decoder.pth, or a checkpoint of the task tiny-decoder")

    sub = add("seed", seed, "write random weights in the original layout, for trials and timings", out="a .ckpt file")
    sub.add_argument("--size", choices=("full", "small"), default="small", help="the released model's, or small")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    return p


def part(text: str) -> tuple[str, list[float]]:
    """A network and its weights, of PART=W[,W…]."""
    name, _, numbers = text.partition("=")
    try:
        return name, [float(number) for number in numbers.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a network and its weight, such as unet=0.5") from None


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parser(prog).parse_args(argv)
    return args.run(args)


def check_output(args: argparse.Namespace) -> None:
    """Finds out that the output cannot be written before anything is read."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists; --force replaces it")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be between 0 and 2**64 - 1, got {seed}")


def write(contents: Callable[[argparse.Namespace], Contents], args: argparse.Namespace) -> int:
    """Runs a command that makes the contents of one file."""
    from pbe.checkpoints.writing import check_suffix, save_checkpoint

    check_suffix(args.out)
    check_output(args)
    tensors, entry = contents(args)
    save_checkpoint(tensors, args.out, entry, overwrite=args.force)
    return 0


def inspect(args: argparse.Namespace) -> int:
    from pbe.checkpoints.adapters import is_of_adapters
    from pbe.checkpoints.formats.opening import find_checkpoint
    from pbe.checkpoints.loading import open_recognised
    from pbe.checkpoints.surgery import describe

    if is_of_adapters(find_checkpoint(args.checkpoint)):
        return inspect_adapters(args)
    facts = describe(open_recognised(args.checkpoint))
    config = facts["config"]
    print(printable(f"{facts['file']}: {facts['layout']} ({facts['kind']})"))
    for part in dataclasses.fields(config):
        print(f"  {part.name}: {getattr(config, part.name)}")
    for name in ("parameters", "dtypes"):
        print(f"  {name}: " + ", ".join(f"{key} {n / 1e6:.2f} M" for key, n in facts[name].items()))
    for name in ("averaged copies", "optimizer"):
        print(f"  {name}: {'yes' if facts[name] else 'no'}")
    for name, value in facts["also"].items():
        if isinstance(value, dict):  # a run's whole config would bury the rest
            value = {key: x for key, x in value.items() if not isinstance(x, dict)}
        print(f"  {name}: {printable(value)}")
    for reason, n in facts["not loaded"].items():
        print(f"  not loaded: {n} tensors ({reason})")
    return 0


def expand(args: argparse.Namespace) -> Contents:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.infer_config import pbe_entry
    from pbe.checkpoints.loading import open_recognised
    from pbe.models.paint_by_example import PaintByExampleConfig
    from pbe.models.stable_diffusion import StableDiffusionConfig

    check_seed(args.seed)
    checkpoint = open_recognised(args.checkpoint, "text tower" if args.clip else None)
    tensors, entry, config = surgery.expand(checkpoint), surgery.entry_of(checkpoint), surgery.config_of(checkpoint)
    if args.clip:
        assert isinstance(config, StableDiffusionConfig | PaintByExampleConfig)  # surgery.expand raises for the others
        unet = dataclasses.replace(config.unet, in_channels=9)
        clip = open_recognised(args.clip)
        tensors, exemplar = surgery.with_exemplar_encoder(tensors, clip, unet.context_dim, args.seed)
        entry = pbe_entry(PaintByExampleConfig(unet, config.vae, exemplar, config.resolution))
    return tensors, {**entry, "inputs": surgery.OUR_INPUTS}


def rewrite(args: argparse.Namespace) -> Contents:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import DTYPES, open_recognised

    checkpoint = open_recognised(args.checkpoint)
    tensors_of = {"slim": surgery.network, "extract-ema": surgery.extract_ema}[args.command]
    entry = surgery.entry_of(checkpoint)
    if vars(args).get("activation"):
        entry["clip_activation"] = args.activation
    return tensors_of(checkpoint, DTYPES[args.dtype] if args.dtype else None), entry


def convert(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_recognised
    from pbe.checkpoints.writing import SUFFIXES, save_checkpoint, save_diffusers
    from pbe.models.paint_by_example import PaintByExampleConfig

    check_output(args)
    checkpoint = open_recognised(args.checkpoint)
    entry, tensors = surgery.entry_of(checkpoint), surgery.network(checkpoint)
    if args.out.suffix in SUFFIXES:
        save_checkpoint(tensors, args.out, entry, overwrite=args.force)
        return 0
    config = surgery.config_of(checkpoint)
    if not isinstance(config, PaintByExampleConfig):
        kind = checkpoint.layout.name
        raise ValueError(f"{args.checkpoint} is {kind}; only Paint by Example can be written as a diffusers folder")
    save_diffusers(tensors, config, args.out, overwrite=args.force)
    return 0


def diff(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_recognised

    found = surgery.diff(open_recognised(args.a), open_recognised(args.b))
    differences = [d for d in found if not d.largest <= args.tolerance]  # a tolerance of NaN ignores nothing
    for d in differences:
        largest = f", largest difference {d.largest:.3g}" if d.what == "values" else ""
        print(printable(f"{d.name}: {d.what}{largest}"))
    print(f"{len(differences)} tensors differ" if differences else "no difference")
    return 1 if differences else 0


def merge(args: argparse.Namespace) -> Contents:
    from pbe.checkpoints import merging, surgery

    weights, parts = args.weights or [1.0], dict(args.part)
    expected = 1 if args.add_difference else len(args.checkpoints)
    for given in (weights, *parts.values()):
        if len(given) != expected:
            raise ValueError(f"the weights {given} are {len(given)}; this merge needs {expected}")
        if not (args.add_difference or abs(sum(given) - 1) <= 1e-6):  # nor NaN
            raise ValueError(f"the weights {given} add up to {sum(given):g}, not to 1")
    if args.add_difference and len(args.checkpoints) != 3:
        raise ValueError(f"--add-difference takes three checkpoints, A B C, got {len(args.checkpoints)}")
    checkpoints = [merging.open_for_merging(path) for path in args.checkpoints]
    if not args.add_difference:
        return merging.merge(checkpoints, weights, parts), surgery.entry_of(checkpoints[0])
    a, b, c = checkpoints
    tensors, left_out = merging.add_difference(a, b, c, weights[0], {name: one for name, (one,) in parts.items()})
    if left_out:
        counts = ", ".join(f"{network} ({count} tensors)" for network, count in left_out.items())
        print(f"left out, since one of the three lacks them: {counts}")
    return tensors, surgery.entry_of(a)


def merge_adapter(args: argparse.Namespace) -> Contents:
    from pbe.checkpoints.loading import load_model, open_recognised
    from pbe.checkpoints.surgery import entry_of

    model = load_model(args.checkpoint, "cpu", "stored", args.adapters, weights="raw")
    if getattr(model, "detail", None) is not None:
        raise ValueError("a detail adapter adds layers, and cannot be merged into others: use it with --adapter FILE")
    distilled = getattr(model.config, "distilled", None)  # by the adapters too, of whatever they were trained on
    entry = entry_of(open_recognised(args.checkpoint))
    return model.state_dict(), entry | ({"distilled": dataclasses.asdict(distilled)} if distilled else {})


def set_vae(args: argparse.Namespace) -> Contents:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_recognised, open_vae

    return surgery.set_vae(open_recognised(args.checkpoint, "autoencoder"), open_vae(args.vae))


def set_tiny_decoder(args: argparse.Namespace) -> Contents:
    from pbe.checkpoints.loading import load_model, open_recognised
    from pbe.checkpoints.surgery import entry_of

    model = load_model(args.checkpoint, "cpu", "stored", tiny_decoder=args.tiny_decoder, weights="raw")
    return model.state_dict(), entry_of(open_recognised(args.checkpoint))


def seed(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import DTYPES
    from pbe.checkpoints.seeding import seeded_checkpoint
    from pbe.checkpoints.writing import PICKLE_SUFFIXES, save_pickle
    from pbe.io.atomic import replacing

    check_output(args)
    check_seed(args.seed)
    if args.out.suffix not in PICKLE_SUFFIXES:
        suffixes = ", ".join(PICKLE_SUFFIXES)
        raise ValueError(f"{args.out}: a file of the original layout is a pickle; its name must end in {suffixes}")
    with replacing(args.out, args.force) as part:
        save_pickle(seeded_checkpoint(args.size, args.seed, DTYPES[args.dtype]), part)
    return 0
