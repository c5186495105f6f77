"""`pbe evaluate`: make and score results, of a checkpoint or any system, on COCOEE or a test set like it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_device, add_force, add_renamed, check_output
from pbe.cli.scoring import (
    add_judges,
    add_loading,
    add_results,
    add_test_set,
    load_judges,
    named_folders,
    open_test_set,
    progress,
    write_scores,
)
from pbe.cli.study import add_study, add_study_report, study, study_report
from pbe.cli.systems import add_guidance_figure, add_run, guidance_figure, run

if TYPE_CHECKING:
    from pbe.data.records import Source

CLIP_FEATURES = "CLIP ViT-B/32"  # those of the released mixture
EPILOG = """\
backbones, whose features are compared, are KIND=FILE, several after one another:
  clip=ViT-B-32.pt                     CLIP, OpenAI's or Hugging Face's file; the paper's scores need ViT-B/32
  dino=dino_vits16_pretrain.pth        a vision transformer of DINO's
  torchvision:resnet50=resnet50.pth    any classifier of torchvision's
  inception=pt_inception-2015-….pth    torch-fidelity's Inception (extra eval)
  surrogate=judge.ckpt                 a small classifier by `surrogate`; do not compare its scores with published ones

exit code: 0 all done, 1 some items could not be generated, 2 nothing could be done
"""


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str, out: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=Path, required=True, help=out)
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        return sub

    add_run(add("run", run, "generate systems' results and score them", "folder of the results and the report"))
    sub = add("score", score, "score folders of results, <id>.png each", "folder of the report")
    add_results(sub)
    add_test_set(sub)
    add_judges(sub)
    add_guidance_figure(
        add("guidance-figure", guidance_figure, "paint by ever more precise texts and by an exemplar", "a picture file")
    )
    about = "make a page on which people rank several systems' results"
    add_study(add("study", study, about, "the study's folder: page/ to hand out, key.json to keep"))
    about = "add up the answers to a study: mean ranks and preferences"
    add_study_report(add("study-report", study_report, about, "folder of study-report.json and study-report.md"))
    about = "make a test set like COCOEE from photos with labelled boxes"
    add_build(add("build", build, about, "the test set's folder"))

    sub = add("fit-mixture", fit, "fit the mixture of the quality score to real photos (extra eval)", "an .npz file")
    sub.add_argument("--real", type=Path, required=True, help="the folder of the photos")
    sub.add_argument("--backbone", required=True, metavar="KIND=FILE", help="on whose features")
    sub.add_argument("--components", type=int, default=20, help="default 20")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    add_loading(sub)
    add_force(sub)

    sub = add("convert-mixture", convert, "make plain arrays of a pickled mixture, executing nothing", "an .npz file")
    sub.add_argument("pickle", type=Path, help="such as the released coco2017_gmm_k20")
    sub.add_argument("--features", default=CLIP_FEATURES, help=f"on which it was fitted (default {CLIP_FEATURES})")
    add_force(sub)

    about = "train a small classifier that judges where no pretrained weights are at hand"
    sub = add("surrogate", surrogate, about, "a .ckpt file")
    sub.add_argument("--data", type=Path, required=True, help="a manifest with labels, disjoint from what is judged")
    sub.add_argument("--images", default="", help="the folder of its pictures, if they are elsewhere")
    sub.add_argument(
        "--area", type=float, nargs=2, default=(0.0, 1.0), metavar="N", help="only boxes with this share of their photo"
    )
    sub.add_argument("--check", type=Path, metavar="MANIFEST", help="other photos, to tell how many it recognises")
    sub.add_argument("--epochs", type=int, default=20, help="default 20")
    sub.add_argument("--size", type=int, default=64, help="of its pictures, in pixels (default 64)")
    sub.add_argument("--seed", type=int, default=0, help="default 0")
    add_device(sub)
    add_force(sub)
    return p


def add_build(p: argparse.ArgumentParser) -> None:
    """The arguments of `build`."""
    kinds = p.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--coco", type=Path, help="annotations of the images, such as instances_val2017")
    kinds.add_argument("--manifest", type=Path, help="or a manifest of them with labels, .csv or .jsonl")
    p.add_argument("--images", type=Path, help="the folder of the pictures; a manifest's may be found without")
    kinds = p.add_mutually_exclusive_group()
    kinds.add_argument("--exemplar-coco", type=Path, help="annotations of the exemplars (default: the images' own)")
    kinds.add_argument("--exemplar-manifest", type=Path, help="or a manifest of them")
    p.add_argument("--exemplar-images", type=Path, help="the folder of their pictures")
    add_renamed(p, {f"reference_{name}": f"exemplar_{name}" for name in ("coco", "manifest", "images")})
    p.add_argument("--backbone", required=True, metavar="KIND=FILE", help="in whose features exemplars are near")
    p.add_argument("-n", "--num-items", type=int, default=3500, help="at most this many (default 3500)")
    p.add_argument("--size", type=int, default=512, help="of the images, in pixels (default 512)")
    p.add_argument(
        "--area", type=float, nargs=2, default=(0.02, 0.8), metavar="N", help="a box's share of it (default 0.02 0.8)"
    )
    p.add_argument("--grow", type=int, default=10, help="pixels around an exemplar's box (default 10)")
    p.add_argument("--min-side", type=int, default=32, help="of an exemplar's box, in pixels (default 32)")
    p.add_argument("--candidates", type=int, default=1000, help="exemplars looked at per category (default 1000)")
    p.add_argument("--seed", type=int, default=0, help="default 0")
    add_device(p)
    add_force(p)


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs one command; returns the exit code."""
    args = parser(prog).parse_args(argv)
    return args.run(args)


def score(args: argparse.Namespace) -> int:
    from pbe.baselines.running import settings_in

    test_set, folders = open_test_set(args), named_folders(args.results)
    settings = {"systems": {name: settings_in(test_set, folder) for name, folder in folders.items()}}
    return write_scores(args, test_set, load_judges(args), folders, settings)


# --- making test sets, mixtures, judges -------------------------------------------------------------------


def build(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device
    from pbe.evaluation.backbones import load_backbone
    from pbe.evaluation.build import BuildConfig, build_test_set

    config = BuildConfig(
        args.num_items, args.size, tuple(args.area), args.grow, args.min_side, args.candidates, args.seed
    )
    images = open_source(args, "")
    assert images is not None  # the parser requires one of the two
    exemplars = open_source(args, "exemplar_") or images
    backbone = load_backbone(args.backbone, choose_device(args.device))
    with progress(args, min(args.num_items, len(images)), "building") as bar:
        count = build_test_set(images, exemplars, args.out, backbone, config, args.force, bar.update)
    print(f"{args.out}: {count} items")
    return 0


def open_source(args: argparse.Namespace, prefix: str) -> Source | None:
    """The data that --coco or --manifest names, or --exemplar-…; None where neither does."""
    from pbe.data.coco import Coco
    from pbe.data.manifest import Manifest

    coco, manifest, images = (getattr(args, prefix + name) for name in ("coco", "manifest", "images"))
    flag = f"--{prefix.replace('_', '-')}"
    if coco is not None:
        if images is None:
            raise ValueError(f"{flag}coco needs {flag}images, the folder of its pictures")
        return Coco(coco, images)
    if manifest is not None:
        return Manifest(manifest, images or "")
    if images is not None:
        raise ValueError(f"{flag}images needs {flag}coco or {flag}manifest, which lists the pictures")
    return None


def fit(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device
    from pbe.evaluation.backbones import load_backbone
    from pbe.evaluation.quality_score import check_fit, check_name, fit_mixture, save_mixture
    from pbe.evaluation.scoring import identity, photo_features, picture_files

    check_output(args)
    check_name(args.out)
    backbone = load_backbone(args.backbone, choose_device(args.device))
    files = picture_files(args.real)
    check_fit(len(files), backbone.num_features, args.components)
    with progress(args, len(files), "real photos") as bar:
        features = photo_features(files, backbone, args.batch_size, args.workers, bar.update)
    mixture = fit_mixture(features, args.components, args.seed, identity(backbone))
    save_mixture(mixture, args.out, args.force)
    print(f"{args.out}: {args.components} components over {features.shape[1]} features of {len(files)} photos")
    return 0


def convert(args: argparse.Namespace) -> int:
    from pbe.evaluation.quality_score import convert_mixture, save_mixture

    mixture = convert_mixture(args.pickle, args.features)
    save_mixture(mixture, args.out, args.force)
    components, features = mixture.means.shape
    print(f"{args.out}: {components} components over {features} features")
    return 0


def surrogate(args: argparse.Namespace) -> int:
    from pbe.checkpoints.loading import choose_device
    from pbe.data.manifest import Manifest
    from pbe.evaluation.surrogate import count_recognised, save_surrogate, train_surrogate

    check_output(args)
    source = Manifest(args.data, args.images, tuple(args.area))
    unseen = Manifest(args.check) if args.check else None
    with progress(args, args.epochs, "training") as bar:

        def shown(epoch: int, loss: float, right: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}, {right:.0%} right")
            bar.update()

        model, classes = train_surrogate(
            source, args.epochs, args.size, seed=args.seed, device=choose_device(args.device), on_epoch=shown
        )
    about = {"data": args.data.name, "pictures": len(source), "epochs": args.epochs, "seed": args.seed}
    about["area"] = list(args.area)
    save_surrogate(model, args.out, classes, about, args.force)
    print(f"{args.out}: {len(classes)} classes, {len(source)} pictures, sizes {asdict(model.config)}")
    if unseen is not None:
        right, objects = count_recognised(model, classes, unseen)
        print(f"right on {right / objects:.1%} of the {objects} objects of {args.check}")
    return 0
