"""`pbe checkpoint`: look into checkpoints and change them."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from pbe.cli.errors import one_line_errors

DTYPES = ("float32", "bfloat16", "float16")
A_FILE = "a file ending in .safetensors or .ckpt"


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, out: str | None = A_FILE):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        if out:
            sub.add_argument("--out", type=Path, required=True, help=out)
            sub.add_argument("--force", action="store_true", help="replace an existing output")
        return sub

    sub = add("inspect", inspect, "say what a checkpoint holds", out=None)
    sub.add_argument("checkpoint", type=Path)

    sub = add("expand", expand, "give Stable Diffusion v1 (or its inpainting model) Paint by Example's nine inputs")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument(
        "--clip",
        type=Path,
        help="a CLIP ViT-L/14: put its vision tower and a fresh mapper in the text tower's place, ready to train",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the fresh mapper (default 0)")

    sub = add("slim", slim, "keep the networks alone: no optimizer, no averaged copies")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("--dtype", choices=DTYPES, help="convert to this precision (default: as it is)")

    sub = add("extract-ema", extract_ema, "put the averaged copies in the place of the parameters")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("--dtype", choices=DTYPES, help="convert to this precision (default: as it is)")

    sub = add(
        "convert",
        convert,
        "rewrite a checkpoint in another format",
        out=f"{A_FILE}, or any other name: a diffusers folder",
    )
    sub.add_argument("checkpoint", type=Path)

    sub = add("diff", diff, "list how two checkpoints differ; exit code 1 if they do", out=None)
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)
    sub.add_argument("--tolerance", type=float, default=0.0, help="ignore differences of values up to this (default 0)")

    sub = add("merge", merge, "write the weighted sum of checkpoints")
    sub.add_argument("checkpoints", type=Path, nargs="+")
    sub.add_argument("--weights", type=float, nargs="+", required=True, help="one a checkpoint, adding up to 1")

    sub = add("merge-lora", merge_adapters, "make adapters part of the weights they were trained on")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("adapter", type=Path)
    sub.add_argument("--weight", type=float, default=1.0, help="how much of the adapters shows (default 1)")

    sub = add("set-vae", set_vae, "put another checkpoint's autoencoder in the place of this one's")
    sub.add_argument("checkpoint", type=Path)
    sub.add_argument("vae", type=Path, help="a checkpoint that holds an autoencoder of the same sizes")

    sub = add("seed", seed, "write random weights in the original layout, for trials and timings", out="a .ckpt file")
    sub.add_argument("--size", choices=("full", "small"), default="small", help="the released model's, or small")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parser(prog).parse_args(argv)
    return args.run(args)


def check_output(args: argparse.Namespace) -> None:
    """Finds out that the output cannot be written before anything is read."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists; --force replaces it")


def check_file(args: argparse.Namespace) -> None:
    """The same for what must be one file."""
    from pbe.checkpoints.writing import check_suffix

    check_suffix(args.out)
    check_output(args)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be between 0 and 2**64 - 1, got {seed}")


def inspect(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import open_source
    from pbe.checkpoints.surgery import describe

    facts = describe(open_source(args.checkpoint))
    config = facts.pop("config")
    print(f"{facts.pop('file')}: {facts.pop('layout')} ({facts.pop('kind')})")
    for part in dataclasses.fields(config):
        print(f"  {part.name}: {getattr(config, part.name)}")
    print("  parameters: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in facts.pop("parameters").items()))
    print("  dtypes: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in facts.pop("dtypes").items()))
    for name in ("averaged copies", "optimizer"):
        print(f"  {name}: {'yes' if facts.pop(name) else 'no'}")
    for name, value in facts.pop("also").items():
        if isinstance(value, dict):  # a run's whole config would bury the rest
            value = {key: x for key, x in value.items() if not isinstance(x, dict)}
        print(f"  {name}: {value}")
    for reason, n in facts.pop("not loaded").items():
        print(f"  not loaded: {n} tensors ({reason})")
    return 0


def expand(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.infer_config import pbe_entry
    from pbe.checkpoints.loading import open_source
    from pbe.checkpoints.writing import save_checkpoint
    from pbe.models.paint_by_example import PaintByExampleConfig

    check_file(args)
    check_seed(args.seed)
    source = open_source(args.checkpoint)
    config = surgery.config_of(source)
    tensors = surgery.expand(source)
    entry = surgery.entry_of(source)
    if args.clip:
        unet = dataclasses.replace(config.unet, in_channels=9)
        tensors, exemplar = surgery.with_exemplar_encoder(tensors, open_source(args.clip), unet.context_dim, args.seed)
        entry = pbe_entry(PaintByExampleConfig(unet, config.vae, exemplar, config.resolution))
    entry["inputs"] = "z_t, z_masked, mask"
    save_checkpoint(tensors, args.out, entry, overwrite=args.force)
    return 0


def slim(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery

    return rewrite(args, surgery.network)


def extract_ema(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery

    return rewrite(args, surgery.extract_ema)


def rewrite(args: argparse.Namespace, tensors_of: Callable) -> int:
    from pbe.checkpoints.loading import DTYPES, open_source
    from pbe.checkpoints.surgery import entry_of
    from pbe.checkpoints.writing import save_checkpoint

    check_file(args)
    source = open_source(args.checkpoint)
    entry = entry_of(source)
    tensors = tensors_of(source, DTYPES[args.dtype] if args.dtype else None)
    save_checkpoint(tensors, args.out, entry, overwrite=args.force)
    return 0


def convert(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_source
    from pbe.checkpoints.writing import SUFFIXES, save_checkpoint, save_diffusers
    from pbe.models.paint_by_example import PaintByExampleConfig

    check_output(args)
    source = open_source(args.checkpoint)
    entry = surgery.entry_of(source)
    if args.out.suffix in SUFFIXES:
        save_checkpoint(surgery.network(source), args.out, entry, overwrite=args.force)
        return 0
    config = surgery.config_of(source)
    if not isinstance(config, PaintByExampleConfig):
        raise ValueError(f"{args.checkpoint} is {source.layout.description}; only Paint by Example becomes a folder")
    save_diffusers(surgery.network(source), config, args.out, overwrite=args.force)
    return 0


def diff(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_source

    differences = [d for d in surgery.diff(open_source(args.a), open_source(args.b)) if not d.largest <= args.tolerance]
    for d in differences:
        print(f"{d.name}: {d.what}" + (f", largest difference {d.largest:.3g}" if d.what == "values" else ""))
    print(f"{len(differences)} tensors differ" if differences else "no difference")
    return 1 if differences else 0


def merge(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_source
    from pbe.checkpoints.writing import save_checkpoint

    check_file(args)
    if not abs(sum(args.weights) - 1) <= 1e-6:  # nor NaN
        raise ValueError(f"the weights {args.weights} add up to {sum(args.weights):g}, not to 1")
    sources = [open_source(path) for path in args.checkpoints]
    entry = surgery.entry_of(sources[0])
    save_checkpoint(surgery.merge(sources, args.weights), args.out, entry, overwrite=args.force)
    return 0


def merge_adapters(args: argparse.Namespace) -> int:
    from pbe.checkpoints.adapters import load_lora
    from pbe.checkpoints.loading import load_model, open_source
    from pbe.checkpoints.surgery import entry_of
    from pbe.checkpoints.writing import save_checkpoint
    from pbe.models.lora import merge_lora

    check_file(args)
    if not math.isfinite(args.weight):
        raise ValueError(f"--weight must be a number, got {args.weight}")
    entry = entry_of(open_source(args.checkpoint))
    model = load_model(args.checkpoint, device="cpu", dtype="float32")
    load_lora(model, args.adapter, args.weight)
    merge_lora(model)
    save_checkpoint(model.state_dict(), args.out, entry, overwrite=args.force)
    return 0


def set_vae(args: argparse.Namespace) -> int:
    from pbe.checkpoints import surgery
    from pbe.checkpoints.loading import open_source
    from pbe.checkpoints.writing import save_checkpoint
    from pbe.training.initialization import read_vae

    check_file(args)
    source = open_source(args.checkpoint)
    entry = surgery.entry_of(source)
    size, state = read_vae(args.vae)
    entry["latent_scale"] = size.latent_scale
    save_checkpoint(surgery.set_vae(source, state), args.out, entry, overwrite=args.force)
    return 0


def seed(args: argparse.Namespace) -> int:
    import torch

    from pbe.checkpoints.loading import DTYPES
    from pbe.checkpoints.seeding import seeded_checkpoint
    from pbe.checkpoints.writing import PICKLE_SUFFIXES
    from pbe.io.atomic import replacing

    check_output(args)
    check_seed(args.seed)
    if args.out.suffix not in PICKLE_SUFFIXES:
        raise ValueError(f"{args.out}: the original layout is a pickle; its name ends in {', '.join(PICKLE_SUFFIXES)}")
    with replacing(args.out, args.force) as part:
        torch.save(seeded_checkpoint(args.size, args.seed, DTYPES[args.dtype]), part)
    return 0
