"""What the commands of `pbe evaluate` share: a test set, the networks that judge, the report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbe.cli.flags import Group, add_device, add_renamed

if TYPE_CHECKING:
    from tqdm import tqdm

    from pbe.evaluation.scoring import Judges
    from pbe.evaluation.test_set import TestSet


def add_test_set(p: argparse.ArgumentParser, is_part_allowed: bool = True) -> None:
    p.add_argument("--test-set", type=Path, required=True, help="COCOEE's folder, or one by `build`")
    add_renamed(p, {"bench": "test_set"})
    if is_part_allowed:
        p.add_argument("--limit", type=int, help="only its first items: for trials, not for published scores")
        p.add_argument("--labels", type=Path, help="CSV file with the columns id and label (default: those by `build`)")


def add_results(p: argparse.ArgumentParser) -> None:
    text = "systems; a folder alone goes by its name"
    p.add_argument("--results", nargs="+", required=True, metavar="NAME=FOLDER", help=text)


def add_loading(g: Group) -> None:
    add_device(g)
    g.add_argument("--batch-size", type=int, default=16, help="pictures per step through the backbones (default 16)")
    workers = min(4, usable_cores())
    g.add_argument("--workers", type=int, default=workers, help=f"processes that read pictures (default {workers})")


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
    g.add_argument("--pictures", type=int, default=200, help="about how many items the page shows (default 200)")
    add_loading(g)


def open_test_set(args: argparse.Namespace) -> TestSet:
    from pbe.evaluation.test_set import TestSet, read_labels

    return TestSet(args.test_set, args.limit, read_labels(args.labels) if args.labels else None)


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of texts NAME=FOLDER or FOLDER. ValueError for a name given twice."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, separator, rest = text.partition("=")
        folder = Path(rest if separator else text)
        name = name if separator else folder.name
        if name in folders:
            raise ValueError(f"two systems are called {name!r}; give NAME=FOLDER")
        folders[name] = folder
    return folders


def load_judges(args: argparse.Namespace) -> Judges:
    from pbe.checkpoints.loading import choose_device
    from pbe.evaluation.backbones import load_backbone
    from pbe.evaluation.bootstrap import Bootstrap
    from pbe.evaluation.lpips import load_lpips
    from pbe.evaluation.quality_score import load_mixture
    from pbe.evaluation.scoring import Judges, picture_files, real_moments

    if args.resamples < 1:
        raise ValueError(f"--resamples must be 1 or more, got {args.resamples}")
    if args.pictures < 0:
        raise ValueError(f"--pictures must be 0 or more, got {args.pictures}")
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"--out {args.out} is a file; give a folder")
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
    return Judges(backbones, real, mixture, lpips, Bootstrap(args.resamples))


def write_scores(
    args: argparse.Namespace,
    test_set: TestSet,
    judges: Judges,
    folders: Mapping[str, Path],
    settings: Mapping[str, Any],
) -> int:
    from pbe.evaluation.report import make_report, markdown, write_report
    from pbe.evaluation.scoring import score_results

    found = []
    for system, folder in folders.items():
        with progress(args, len(test_set.items), f"scoring {system}") as bar:
            found.append(score_results(test_set, folder, judges, system, args.batch_size, args.workers, bar.update))
    report = make_report(test_set, found, judges, args.real and args.real.resolve().name, settings)
    write_report(report, test_set, folders, args.out, args.pictures)
    print(markdown(report))
    print(args.out / "report.html")
    return 0


def progress(args: argparse.Namespace, total: int, what: str) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=args.quiet, file=sys.stderr)
