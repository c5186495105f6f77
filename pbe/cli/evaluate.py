"""`pbe evaluate`: score a checkpoint, or any system's results, on COCOEE or a benchmark like it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.jobs import Job

if TYPE_CHECKING:
    from tqdm import tqdm

    from pbe.evaluation.benchmark import Benchmark
    from pbe.evaluation.scoring import Judges

CLIP_FEATURES = "CLIP ViT-B/32"  # those of the released mixture
EPILOG = """\
backbones, whose features are compared, are KIND=FILE, several after one another:
  clip=ViT-B-32.pt                     CLIP, OpenAI's or Hugging Face's file; the paper's figures need ViT-B/32
  dino=dino_vits16_pretrain.pth        a vision transformer of DINO's
  torchvision:resnet50=resnet50.pth    any classifier of torchvision's
  inception=pt_inception-2015-….pth    torch-fidelity's Inception (extra eval)
  stand-in=judge.ckpt                  a small classifier by `stand-in`; its figures compare with nothing published

exit code: 0 all done, 1 some items could not be generated, 2 nothing could be done
"""


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, out: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=Path, required=True, help=out)
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        return sub

    sub = add("run", run, "generate a checkpoint's results and score them", "folder of the results and the report")
    sub.add_argument("--ckpt", type=Path, required=True, help="a checkpoint, or a folder of diffusers")
    add_benchmark(sub)
    g = sub.add_argument_group("generation; what is done already, with the same settings and weights, is kept")
    g.add_argument("--sampler", default=Job.sampler, help=f"plms, ddim, ddpm or dpm_solver (default {Job.sampler})")
    g.add_argument("--steps", type=int, default=Job.steps, help=f"default {Job.steps}")
    g.add_argument("--scale", type=float, default=Job.scale, help=f"of the guidance (default {Job.scale:g})")
    g.add_argument("--seed", type=int, default=42, help="of the first item, the next have the next (default 42)")
    g.add_argument("--resolution", type=int, help="of the model (default: what it was trained on)")
    g.add_argument("--dtype", default="auto", help="auto (default: float16 on cuda), float32, bfloat16, float16")
    g.add_argument("--devices", type=int, default=1, help="divide the items over this many devices (default 1)")
    g.add_argument("--num-nodes", type=int, default=1, help="and over this many nodes (default 1)")
    g.add_argument("--redo", action="store_true", help="also generate what is there")
    add_judges(sub)

    sub = add("score", score, "score folders of results, <id>.png each", "folder of the report")
    sub.add_argument(
        "--results", nargs="+", required=True, metavar="NAME=FOLDER", help="systems; a folder alone goes by its name"
    )
    add_benchmark(sub)
    add_judges(sub)

    sub = add("build", build, "make a benchmark like COCOEE from COCO-format data", "the benchmark's folder")
    sub.add_argument("--coco", type=Path, required=True, help="annotations of the sources, such as instances_val2017")
    sub.add_argument("--images", type=Path, required=True, help="the folder of their pictures")
    sub.add_argument("--reference-coco", type=Path, help="annotations of the references (default: --coco)")
    sub.add_argument("--reference-images", type=Path, help="the folder of their pictures")
    sub.add_argument("--backbone", required=True, metavar="KIND=FILE", help="in whose features references are near")
    sub.add_argument("-n", "--num-items", type=int, default=3500, help="at most so many (default 3500)")
    sub.add_argument("--size", type=int, default=512, help="of the sources, in pixels (default 512)")
    sub.add_argument(
        "--area", type=float, nargs=2, default=(0.02, 0.8), metavar="N", help="a box's share of it (default 0.02 0.8)"
    )
    sub.add_argument("--grow", type=int, default=10, help="pixels around a reference's box (default 10)")
    sub.add_argument("--min-side", type=int, default=32, help="of a reference's box, in pixels (default 32)")
    sub.add_argument("--candidates", type=int, default=1000, help="for references, a category (default 1000)")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    sub.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    sub.add_argument("--force", action="store_true", help="replace an existing benchmark")

    sub = add("fit-mixture", fit, "fit the mixture of the quality score to real photos (extra eval)", "an .npz file")
    sub.add_argument("--real", type=Path, required=True, help="the folder of the photos")
    sub.add_argument("--backbone", required=True, metavar="KIND=FILE", help="on whose features")
    sub.add_argument("--components", type=int, default=20, help="default 20")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    add_loading(sub)
    sub.add_argument("--force", action="store_true", help="replace an existing file")

    sub = add("convert-mixture", convert, "make plain arrays of a pickled mixture, executing nothing", "an .npz file")
    sub.add_argument("pickle", type=Path, help="such as the released coco2017_gmm_k20")
    sub.add_argument("--features", default=CLIP_FEATURES, help=f"on which it was fitted (default {CLIP_FEATURES})")
    sub.add_argument("--force", action="store_true", help="replace an existing file")

    sub = add(
        "stand-in", stand_in, "train a small classifier to judge with where no weights are at hand", "a .ckpt file"
    )
    sub.add_argument("--data", type=Path, required=True, help="a manifest with labels, disjoint from what is judged")
    sub.add_argument("--images", default="", help="the folder of its pictures, if they are elsewhere")
    sub.add_argument("--epochs", type=int, default=20, help="default 20")
    sub.add_argument("--size", type=int, default=64, help="of its pictures, in pixels (default 64)")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    sub.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    sub.add_argument("--force", action="store_true", help="replace an existing file")
    return p


def add_benchmark(p: argparse.ArgumentParser) -> None:
    p.add_argument("--bench", type=Path, required=True, help="COCOEE's folder, or one by `build`")
    p.add_argument("--limit", type=int, help="its first items alone: for trials, not for figures")


def add_loading(p: argparse._ActionsContainer) -> None:
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    p.add_argument("--batch-size", type=int, default=16, help="pictures a step through the backbones (default 16)")
    workers = min(4, usable_cores())
    p.add_argument("--workers", type=int, default=workers, help=f"processes that read pictures (default {workers})")


def usable_cores() -> int:
    """Those that this process may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_judges(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("scores")
    g.add_argument("--backbone", nargs="+", default=[], metavar="KIND=FILE", help="whose features are compared")
    g.add_argument("--real", type=Path, help="real photos for FID, such as COCO's test2017; their moments are kept")
    g.add_argument("--mixture", type=Path, help="for QS: an .npz by fit-mixture or convert-mixture")
    g.add_argument("--lpips", type=Path, help="torchvision's AlexNet (alexnet-owt-7be5be79.pth), for background LPIPS")
    g.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default 1000; FID: 100)")
    g.add_argument("--pictures", type=int, default=200, help="about so many items on the page (default 200)")
    add_loading(g)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parser(prog).parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, MemoryError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# --- scoring ----------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device, choose_dtype
    from pbe.checkpoints.reading import find_checkpoint
    from pbe.evaluation.backbones import sha256_of
    from pbe.evaluation.benchmark import Benchmark
    from pbe.evaluation.generate import composite_result, generate, make_jobs

    bench = Benchmark(args.bench, args.limit)
    raw, composited = args.out / "raw", args.out / "composited"
    jobs = make_jobs(bench, raw, args.sampler, args.steps, args.scale, args.seed, args.resolution)
    # A wrong file shows before hours of work; of several processes only the first needs the judges, later.
    judges = load_judges(args) if args.devices * args.num_nodes == 1 else None
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with progress(args, len(jobs), "generating") as bar:
        outcomes = generate(
            jobs,
            args.ckpt,
            args.device,
            args.dtype,
            args.devices,
            args.num_nodes,
            args.redo,
            on_done=lambda _: bar.update(),
        )
    if outcomes is None:  # the first process goes on for all
        return 0
    count = Counter(outcome.status for outcome in outcomes)
    print(f"{len(jobs)} items: {count['done']} generated, {count['skipped']} were there, {count['failed']} failed")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed[:10]:
        print(f"{bench.items[outcome.line].name} failed: {outcome.reason}", file=sys.stderr)
    if failed:
        return 1
    with progress(args, len(jobs), "compositing") as bar:
        for item in bench.items:
            composite_result(item, raw / f"{item.name}.png", composited / f"{item.name}.png")
            bar.update()
    dtype = choose_dtype(args.dtype, choose_device(args.device))
    settings = {name: getattr(args, name) for name in ("sampler", "steps", "scale", "seed", "resolution")}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "window": "full"}
    checkpoint = find_checkpoint(args.ckpt)
    settings["checkpoint"] = {"file": checkpoint.name, "sha256": sha256_of(checkpoint)}
    return write_scores(args, bench, judges or load_judges(args), {"raw": raw, "composited": composited}, settings)


def score(args: argparse.Namespace) -> int:
    from pbe.evaluation.benchmark import Benchmark

    folders: dict[str, Path] = {}
    for text in args.results:
        name, separator, folder = text.partition("=")
        name, folder = (name, Path(folder)) if separator else (Path(text).name, Path(text))
        if name in folders:
            raise ValueError(f"two systems are called {name!r}; give NAME=FOLDER")
        folders[name] = folder
    return write_scores(args, Benchmark(args.bench, args.limit), load_judges(args), folders, {})


def load_judges(args: argparse.Namespace) -> Judges:
    from pbe.checkpoints.loading import choose_device
    from pbe.evaluation.backbones import load_backbone
    from pbe.evaluation.lpips import load_lpips
    from pbe.evaluation.mixture import load_mixture
    from pbe.evaluation.scoring import Judges, picture_files, real_moments

    if args.resamples < 1:
        raise ValueError(f"--resamples must be 1 or more, got {args.resamples}")
    device = choose_device(args.device)
    loaded = [load_backbone(text, device) for text in args.backbone]
    backbones = {backbone.kind: backbone for backbone in loaded}
    if len(backbones) < len(loaded):
        raise ValueError("--backbone names a kind twice")
    if args.real and not backbones:
        raise ValueError("--real is for FID, which needs a --backbone")
    lpips = load_lpips(args.lpips, device) if args.lpips else None
    mixture = load_mixture(args.mixture) if args.mixture else None
    Judges(backbones, mixture=mixture)  # whether they fit each other shows before the photos are read
    real = {}
    for kind, backbone in backbones.items() if args.real else ():
        with progress(args, len(picture_files(args.real)), f"real photos, {kind}") as bar:
            real[kind] = real_moments(args.real, backbone, args.out, args.batch_size, args.workers, bar.update)
    return Judges(backbones, real, mixture, lpips, args.resamples)


def write_scores(
    args: argparse.Namespace,
    bench: Benchmark,
    judges: Judges,
    folders: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> int:
    from pbe.evaluation.report import make_report, table, write_report
    from pbe.evaluation.scoring import score_results

    found = []
    for system, folder in folders.items():
        with progress(args, len(bench.items), f"scoring {system}") as bar:
            found.append(score_results(bench, folder, judges, system, args.batch_size, args.workers, bar.update))
    report = make_report(bench, found, judges, args.real and args.real.resolve().name, settings)
    write_report(report, bench, folders, args.out, args.pictures)
    print(table(report))
    print(f"{args.out / 'report.html'}")
    return 0


def progress(args: argparse.Namespace, total: int, what: str) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=args.quiet, file=sys.stderr)


# --- making benchmarks, mixtures, judges ------------------------------------------------------------------


def build(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device
    from pbe.data.coco import Coco
    from pbe.evaluation.backbones import load_backbone
    from pbe.evaluation.build import BuildConfig, build_benchmark

    if (args.reference_coco is None) != (args.reference_images is None):
        raise ValueError("--reference-coco and --reference-images belong together")
    config = BuildConfig(
        args.num_items, args.size, tuple(args.area), args.grow, args.min_side, args.candidates, args.seed
    )
    backbone = load_backbone(args.backbone, choose_device(args.device))
    sources = Coco(args.coco, args.images)
    references = Coco(args.reference_coco, args.reference_images) if args.reference_coco else sources
    with progress(args, min(args.num_items, len(sources)), "building") as bar:
        count = build_benchmark(sources, references, args.out, backbone, config, args.force, bar.update)
    print(f"{args.out}: {count} items")
    return 0


def fit(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device
    from pbe.evaluation.backbones import load_backbone
    from pbe.evaluation.mixture import fit_mixture, save_mixture
    from pbe.evaluation.scoring import identity, photo_features, picture_files

    check_output(args)
    backbone = load_backbone(args.backbone, choose_device(args.device))
    files = picture_files(args.real)
    with progress(args, len(files), "real photos") as bar:
        features = photo_features(files, backbone, args.batch_size, args.workers, bar.update)
    mixture = fit_mixture(features, args.components, args.seed, identity(backbone))
    save_mixture(mixture, args.out, args.force)
    print(f"{args.out}: {args.components} components over {features.shape[1]} features of {len(files)} photos")
    return 0


def convert(args: argparse.Namespace) -> int:
    from pbe.evaluation.mixture import convert_mixture, save_mixture

    mixture = convert_mixture(args.pickle, args.features)
    save_mixture(mixture, args.out, args.force)
    components, features = mixture.means.shape
    print(f"{args.out}: {components} components over {features} features")
    return 0


def stand_in(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device
    from pbe.data.manifest import Manifest
    from pbe.evaluation.stand_in import save_stand_in, train_stand_in

    check_output(args)
    source = Manifest(args.data, args.images)
    with progress(args, args.epochs, "training") as bar:

        def shown(epoch: int, loss: float, right: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}, {right:.0%} right")
            bar.update()

        model, classes = train_stand_in(
            source, args.epochs, args.size, seed=args.seed, device=choose_device(args.device), on_epoch=shown
        )
    about = {"data": args.data.name, "pictures": len(source), "epochs": args.epochs, "seed": args.seed}
    save_stand_in(model, args.out, classes, about, args.force)
    print(f"{args.out}: {len(classes)} classes, sizes {asdict(model.config)}")
    return 0


def check_output(args: argparse.Namespace) -> None:
    """Finds out that the output cannot be written before anything is computed."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists; --force replaces it")
