"""`pbe evaluate run` and `guidance-figure`: results of the systems that the paper compares with."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.cli.flags import add_device, add_dtype, add_force, add_renamed, add_settings, add_weights, check_output, flag
from pbe.cli.scoring import add_judges, add_test_set, load_judges, open_test_set, progress, write_scores
from pbe.editing.settings import SAMPLING

if TYPE_CHECKING:
    from pbe.baselines import WeightFiles
    from pbe.baselines.running import SystemRun
    from pbe.batch.run import Outcome
    from pbe.evaluation.test_set import TestSet

OURS = "paint-by-example"
FLAGS = {"paint_by_example": "--ckpt"}
FLAGS |= {kind: flag(kind) for kind in ("stable_diffusion", "adm", "clip", "vocabulary")}
SYSTEMS = """\
systems, and the files that they need:
  paint-by-example          --ckpt
  copy-paste                none: the exemplar's pixels in the place of the mask's box
  copy-paste-poisson        none: the same, blended in seamlessly
  stable-diffusion-text     --stable-diffusion --vocabulary
  stable-diffusion-image    --stable-diffusion --vocabulary --clip
  blended-diffusion-text    --adm --clip --vocabulary
  blended-diffusion-image   --adm --clip
those guided by text read "a photo of a <label>" (--labels)

exit code: 0 all done, 1 some items could not be generated, 2 nothing could be done
"""


def add_files(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    g = p.add_argument_group("files of weights")
    about = "Paint by Example: a checkpoint, a folder of diffusers, or demo"
    g.add_argument("--ckpt", type=Path, dest="paint_by_example", metavar="FILE", help=about)
    add_weights(g)
    g.add_argument("--stable-diffusion", type=Path, metavar="FILE", help="Stable Diffusion v1, such as sd-v1-4.ckpt")
    g.add_argument("--vocabulary", type=Path, metavar="FILE", help="CLIP's: bpe_simple_vocab_16e6.txt.gz")
    return g


def add_run(p: argparse.ArgumentParser) -> None:
    """The arguments of `run`."""
    p.epilog, p.formatter_class = SYSTEMS, argparse.RawDescriptionHelpFormatter
    p.add_argument("--system", nargs="+", default=[OURS], metavar="NAME", help=f"of those below (default {OURS})")
    add_test_set(p)
    g = add_files(p)
    g.add_argument("--adm", type=Path, metavar="FILE", help="256x256_diffusion_uncond.pt or 512x512_diffusion.pt")
    g.add_argument("--clip", type=Path, metavar="FILE", help="CLIP; Stable Diffusion needs ViT-L-14.pt")
    g.add_argument(
        "--blended-clip", type=Path, metavar="FILE", help="Blended Diffusion's: ViT-B-16.pt (default --clip)"
    )
    g = p.add_argument_group(
        "settings of the systems that have them",
        f"The defaults here are {OURS}'s; the others have their published ones.",
    )
    add_settings(g, names=SAMPLING)
    g = p.add_argument_group("generation; what is done already, with the same settings and weights, is kept")
    g.add_argument("--seed", type=int, default=42, help="of the first item, the next have the next (default 42)")
    add_dtype(g)
    g.add_argument("--devices", type=int, default=1, metavar="N", help="divide the items over N devices (default 1)")
    g.add_argument("--num-nodes", type=int, default=1, metavar="N", help="and over N nodes (default 1)")
    g.add_argument("--redo", action="store_true", help="also generate what is there")
    add_judges(p)
    add_renamed(p, {"scale": "guidance"})


def add_guidance_figure(p: argparse.ArgumentParser) -> None:
    """The arguments of `guidance-figure`."""
    p.add_argument("--image", type=Path, required=True, help="the photo")
    p.add_argument("--mask", type=Path, required=True, help="white where to repaint")
    p.add_argument("--exemplar", type=Path, required=True, help="the picture of the object")
    p.add_argument("--texts", nargs="+", required=True, metavar="TEXT", help="ever more precise ones")
    add_files(p)
    g = p.add_argument_group("generation")
    g.add_argument("--seeds", type=int, nargs="+", default=[42], help="each is a row of the figure (default 42)")
    g.add_argument("--steps", type=int, help="default 50")
    add_device(g)
    add_dtype(g)
    add_force(p)
    add_renamed(p, {"source": "image"})


# --- run --------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    from pbe.baselines.running import prepare_run
    from pbe.evaluation.compositing import composite_result

    check_options(args)
    test_set = open_test_set(args)
    given = {name: getattr(args, name) for name in SAMPLING}
    # A wrong option or file shows before hours of work; of several processes only the first needs the judges, later.
    runs = [prepare_run(name, weights_of(args, name), test_set, given, args.seed) for name in args.system]
    judges = load_judges(args) if args.devices * args.num_nodes == 1 else None
    raw = {name: args.out / name / "raw" for name in args.system}
    outcomes = generate(args, runs, test_set, raw)
    if outcomes is None:
        return 0
    failed = [name for name in raw if report_outcomes(name, outcomes[name], test_set)]
    if failed:
        return 1
    composited = {}
    for name, folder in raw.items():
        composited[f"{name}, composited"] = out = args.out / name / "composited"
        with progress(args, len(test_set.items), f"compositing {name}") as bar:
            for item in test_set.items:
                composite_result(item, folder / f"{item.name}.png", out / f"{item.name}.png")
                bar.update()
    settings = {"seed": args.seed, "systems": {one.name: describe(one) for one in runs}}
    return write_scores(args, test_set, judges or load_judges(args), raw | composited, settings)


def check_options(args: argparse.Namespace) -> None:
    """ValueError for systems named twice, a setting that none of them has, and no device."""
    from pbe.baselines import get_baseline

    names = args.system
    if len(set(names)) < len(names):
        raise ValueError(f"--system names one twice: {' '.join(names)}")
    settings = {setting for name in names for setting in get_baseline(name).settings}
    for name in SAMPLING:
        if getattr(args, name) is not None and name not in settings:
            raise ValueError(f"{flag(name)} is not a setting of {' or '.join(names)}")
    if args.adapter and OURS not in names:
        raise ValueError(f"--adapter changes {OURS}, which --system does not name")
    for name in ("devices", "num_nodes"):
        if getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} must be 1 or more, got {getattr(args, name)}")


def weights_of(args: argparse.Namespace, name: str) -> WeightFiles:
    """The files given for the system called `name`; ValueError that names the options of those it lacks."""
    from pbe.baselines import get_baseline

    given = {kind: getattr(args, kind) for kind in get_baseline(name).files}
    if name.startswith("blended") and args.blended_clip is not None:
        given["clip"] = args.blended_clip
    return weight_files(args, name, given)


def weight_files(args: argparse.Namespace, who: str, given: Mapping[str, Path | None]) -> WeightFiles:
    """The given files; ValueError that names those which are None, and their options."""
    from pbe.baselines import WeightFiles
    from pbe.baselines.systems import FILE_KINDS

    missing = [f"{FILE_KINDS[kind]} by {FLAGS[kind]}" for kind, path in given.items() if path is None]
    if missing:
        raise ValueError(f"{who} needs {' and '.join(missing)}")
    adapters = tuple(args.adapter) if "paint_by_example" in given else ()
    return WeightFiles(**given, device=args.device, dtype=args.dtype, adapters=adapters, weights=args.weights)


def generate(
    args: argparse.Namespace, runs: Sequence[SystemRun], test_set: TestSet, folders: Mapping[str, Path]
) -> dict[str, list[Outcome]] | None:
    """Makes the systems' raw results that are not there yet; None in all but the first of several processes."""
    from pbe.baselines.running import result_maker, run_distributed

    if args.devices * args.num_nodes > 1:
        return run_distributed(runs, folders, args.devices, args.num_nodes, args.device, args.redo, not args.quiet)
    outcomes: dict[str, list[Outcome]] = {one.name: [] for one in runs}
    for one in runs:
        make = result_maker(one, folders[one.name], args.redo)
        with progress(args, len(test_set.items), f"generating {one.name}") as bar:
            for i in range(len(test_set.items)):
                outcomes[one.name].append(make(i))
                bar.update()
    return outcomes


def report_outcomes(name: str, outcomes: Sequence[Outcome], test_set: TestSet) -> bool:
    """Says what became of a system's items; whether any failed."""
    count = Counter(outcome.status for outcome in outcomes)
    print(
        f"{name}, {len(outcomes)} items: {count['done']} generated, {count['skipped']} were there, "
        f"{count['failed']} failed"
    )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed[:10]:
        print(f"{test_set.items[outcome.line].name} failed: {outcome.reason}", file=sys.stderr)
    return bool(failed)


def describe(one: SystemRun) -> dict[str, Any]:
    """How a system's results were made, for the report."""
    from pbe.checkpoints.formats.opening import find_checkpoint
    from pbe.io.checksums import sha256_of

    files = {kind: find_checkpoint(one.weights.path(kind)) for kind in one.baseline.files}
    if not files:
        return dict(one.settings)
    weights = {kind: {"file": path.name, "sha256": sha256_of(path)} for kind, path in files.items()}
    if one.weights.weights != "auto" and "paint_by_example" in weights:
        weights["paint_by_example"]["weights"] = one.weights.weights
    about = {name: value for name, value in one.about.items() if name in ("dtype", "adapters")}
    return {**one.settings, **about, "weights": weights}


# --- the figure -------------------------------------------------------------------------------------------


def guidance_figure(args: argparse.Namespace) -> int:
    from pbe.baselines.guidance_figure import save_guidance_figure

    check_output(args)
    kinds = ("paint_by_example", "stable_diffusion", "vocabulary")
    weights = weight_files(args, "the figure", {kind: getattr(args, kind) for kind in kinds})
    with progress(args, len(args.seeds) * (len(args.texts) + 1), "painting") as bar:
        save_guidance_figure(
            args.out, args.image, args.mask, args.exemplar, args.texts, args.seeds, weights, args.steps, bar.update
        )
    print(args.out)
    return 0
