"""`pbe evaluate run` and `guidance-figure`: results of the systems that the paper compares with."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.cli.flags import add_dtype
from pbe.cli.scoring import add_benchmark, add_judges, load_judges, open_benchmark, progress, write_scores
from pbe.editing.settings import SETTINGS
from pbe.io.fields import read

if TYPE_CHECKING:
    from pbe.baselines import Weights
    from pbe.baselines.running import Plan
    from pbe.batch.run import Outcome
    from pbe.evaluation.test_set import Benchmark

OURS = "paint-by-example"
# Options by the settings that they give; a system that lacks one has no use for the option.
OPTIONS = {
    "sampler": "sampler",
    "spacing": "spacing",
    "steps": "steps",
    "guidance": "scale",
    "guidance_interval": "guidance_interval",
    "resolution": "resolution",
}
FLAGS = {
    "paint_by_example": "--ckpt",
    "stable_diffusion": "--stable-diffusion",
    "adm": "--adm",
    "clip": "--clip",
    "vocabulary": "--vocabulary",
}
SYSTEMS = """\
systems, and the files that they need:
  paint-by-example          --ckpt
  copy-paste                none: the reference's pixels in the place of the mask's box
  copy-paste-poisson        none: the same, blended in seamlessly
  stable-diffusion-text     --stable-diffusion --vocabulary
  stable-diffusion-image    --stable-diffusion --vocabulary --clip
  blended-diffusion-text    --adm --clip --vocabulary
  blended-diffusion-image   --adm --clip
those guided by text read "a photo of a <label>" (--labels)

exit code: 0 all done, 1 some items could not be generated, 2 nothing could be done
"""


def add_files(g: argparse._ArgumentGroup) -> None:
    g.add_argument("--ckpt", type=Path, help="Paint by Example: a checkpoint, a folder of diffusers, or demo")
    g.add_argument("--stable-diffusion", type=Path, metavar="FILE", help="Stable Diffusion v1, such as sd-v1-4.ckpt")
    g.add_argument("--vocabulary", type=Path, metavar="FILE", help="CLIP's: bpe_simple_vocab_16e6.txt.gz")


def add_run(p: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    p.epilog, p.formatter_class = SYSTEMS, argparse.RawDescriptionHelpFormatter
    p.add_argument("--system", nargs="+", default=[OURS], metavar="NAME", help=f"of those below (default {OURS})")
    add_benchmark(p)
    g = p.add_argument_group("files of weights")
    add_files(g)
    g.add_argument(
        "--adm",
        type=Path,
        metavar="FILE",
        help="256x256_diffusion_uncond.pt or 512x512_diffusion.pt (Blended Diffusion)",
    )
    g.add_argument("--clip", type=Path, metavar="FILE", help="CLIP; Stable Diffusion needs ViT-L-14.pt")
    g.add_argument(
        "--blended-clip",
        type=Path,
        metavar="FILE",
        help="Blended Diffusion's, as released ViT-B-16.pt (default: --clip)",
    )
    g = p.add_argument_group("generation; what is done already, with the same settings and weights, is kept")
    g.add_argument("--sampler", help=f"of {OURS}: plms, ddim, ddpm or dpm_solver (default plms)")
    g.add_argument("--spacing", help=f"of {OURS}'s timesteps: leading or trailing (default leading)")
    g.add_argument("--steps", type=int, help="of all systems (default: each system's own, 50 or, blended, 100)")
    g.add_argument("--scale", type=float, help="of classifier-free guidance (default 5; Stable Diffusion: 7.5)")
    g.add_argument(
        "--guidance-interval",
        metavar="LOW,HIGH",
        help=f"of {OURS}: guidance only at timesteps above LOW and up to HIGH, of 0 to 999 (default: all)",
    )
    g.add_argument("--seed", type=int, default=42, help="of the first item, the next have the next (default 42)")
    g.add_argument("--resolution", type=int, help=f"of {OURS} (default: what it was trained on)")
    add_dtype(g)
    g.add_argument("--devices", type=int, default=1, help="divide the items over so many devices (default 1)")
    g.add_argument("--num-nodes", type=int, default=1, help="and over this many nodes (default 1)")
    g.add_argument("--redo", action="store_true", help="also generate what is there")
    add_judges(p)


def add_guidance_figure(p: argparse.ArgumentParser) -> None:
    """The arguments of `guidance-figure`."""
    p.add_argument("--source", type=Path, required=True, help="the photo")
    p.add_argument("--mask", type=Path, required=True, help="white where to repaint")
    p.add_argument("--exemplar", type=Path, required=True, help="the picture of the object")
    p.add_argument("--texts", nargs="+", required=True, metavar="TEXT", help="ever more precise ones")
    g = p.add_argument_group("files of weights")
    add_files(g)
    g = p.add_argument_group("generation")
    g.add_argument("--seeds", type=int, nargs="+", default=[42], help="a row of the figure each (default 42)")
    g.add_argument("--steps", type=int, help="default 50")
    g.add_argument("--device", default="auto", help="auto (default), cpu, cuda, …")
    add_dtype(g)
    p.add_argument("--force", action="store_true", help="replace an existing picture")


# --- run --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    from pbe.baselines.running import make_plan
    from pbe.evaluation.compositing import composite_result

    check_options(args)
    bench = open_benchmark(args)
    given = {setting: getattr(args, option) for setting, option in OPTIONS.items()}
    if args.guidance_interval is not None:
        given["guidance_interval"] = list(
            read("guidance_interval", args.guidance_interval, SETTINGS["guidance_interval"])
        )  # as JSON has it
    # A wrong option or file shows before hours of work; of several processes only the first needs the judges, later.
    plans = {name: make_plan(name, weights_of(args, name), bench, given, args.seed) for name in args.system}
    folders = {name: args.out / name for name in plans}
    judges = load_judges(args) if args.devices * args.num_nodes == 1 else None
    outcomes = generate(args, [*plans.values()], bench, {name: folder / "raw" for name, folder in folders.items()})
    if outcomes is None:
        return 0
    failed = [name for name in plans if report_outcomes(name, outcomes[name], bench)]
    if failed:
        return 1
    results = {}
    for name, folder in folders.items():
        with progress(args, len(bench.items), f"compositing {name}") as bar:
            for item in bench.items:
                composite_result(item, folder / "raw" / f"{item.name}.png", folder / "composited" / f"{item.name}.png")
                bar.update()
        results[name] = folder / "raw"
    results |= {f"{name}, composited": folder / "composited" for name, folder in folders.items()}
    settings = {"seed": args.seed, "systems": {name: describe(plan) for name, plan in plans.items()}}
    return write_scores(args, bench, judges or load_judges(args), results, settings)


def check_options(args: argparse.Namespace) -> None:
    """ValueError for systems named twice, an option that none of them has, and no device."""
    from pbe.baselines import get_baseline

    names = args.system
    if len(set(names)) < len(names):
        raise ValueError(f"--system names one twice: {' '.join(names)}")
    settings = {setting for name in names for setting in get_baseline(name).settings}
    for setting, option in OPTIONS.items():
        if getattr(args, option) is not None and setting not in settings:
            raise ValueError(f"--{option.replace('_', '-')} is nothing that {' and '.join(names)} has")
    for option in ("devices", "num_nodes"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be 1 or more, got {getattr(args, option)}")


def weights_of(args: argparse.Namespace, name: str) -> Weights:
    """The files given for the system called `name`; ValueError that names the options of those it lacks."""
    from pbe.baselines import Weights, get_baseline

    files = get_baseline(name).files
    given = {kind: args.ckpt if kind == "paint_by_example" else getattr(args, kind) for kind in files}
    if name.startswith("blended") and args.blended_clip is not None:
        given["clip"] = args.blended_clip
    check_given(name, given)
    return Weights(**given, device=args.device, dtype=args.dtype)


def check_given(who: str, given: Mapping[str, Path | None]) -> None:
    """ValueError that names the files which are None, and their options."""
    from pbe.baselines.systems import WEIGHT_FILES

    missing = [f"{WEIGHT_FILES[kind]} by {FLAGS[kind]}" for kind, path in given.items() if path is None]
    if missing:
        raise ValueError(f"{who} needs {' and '.join(missing)}")


def generate(
    args: argparse.Namespace, plans: Sequence[Plan], bench: Benchmark, folders: Mapping[str, Path]
) -> dict[str, list[Outcome]] | None:
    """Makes the systems' raw results that are not there yet; None in all but the first of several processes."""
    from pbe.baselines.running import run_plan

    if args.devices * args.num_nodes > 1:
        from pbe.baselines.distributed import run_divided

        return run_divided(
            plans, bench, folders, args.devices, args.num_nodes, args.device, args.redo, progress=not args.quiet
        )
    outcomes = {}
    for plan in plans:
        with progress(args, len(bench.items), f"generating {plan.name}") as bar:
            outcomes[plan.name] = run_plan(plan, bench, folders[plan.name], args.redo, lambda _: bar.update())
    return outcomes


def report_outcomes(name: str, outcomes: Sequence[Outcome], bench: Benchmark) -> bool:
    """Says what became of a system's items; whether any failed."""
    count = Counter(outcome.status for outcome in outcomes)
    print(
        f"{name}, {len(outcomes)} items: {count['done']} generated, {count['skipped']} were there, "
        f"{count['failed']} failed"
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed[:10]:
        print(f"{bench.items[outcome.line].name} failed: {outcome.reason}", file=sys.stderr)
    return bool(failed)


def describe(plan: Plan) -> dict[str, Any]:
    """How a system's results were made, for the report."""
    from pbe.checkpoints.formats.opening import find_checkpoint
    from pbe.evaluation.backbones import sha256_of

    files = {kind: find_checkpoint(plan.weights.path(kind)) for kind in plan.baseline.files}
    if not files:
        return dict(plan.settings)
    weights = {kind: {"file": path.name, "sha256": sha256_of(path)} for kind, path in files.items()}
    return {**plan.settings, "dtype": plan.about["dtype"], "weights": weights}


# --- the figure -------------------------------------------------------------------------------------------


def guidance_figure(args: argparse.Namespace) -> int:
    from pbe.baselines import Weights
    from pbe.baselines import guidance_figure as figures

    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists; --force replaces it")
    given = {
        "paint_by_example": args.ckpt,
        "stable_diffusion": args.stable_diffusion,
        "vocabulary": args.vocabulary,
    }
    check_given("the figure", given)
    weights = Weights(**given, device=args.device, dtype=args.dtype)
    with progress(args, len(args.seeds) * (len(args.texts) + 1), "painting") as bar:
        figures.save_guidance_figure(
            args.out, args.source, args.mask, args.exemplar, args.texts, args.seeds, weights, args.steps, bar.update
        )
    print(args.out)
    return 0
