"""`pbe evaluate study` and `study-report`: have people rank several systems' results, and add up what they say."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_study(commands: argparse._SubParsersAction) -> None:
    """Adds the command `study`, whose `run` takes the arguments and returns the exit code."""
    about = "make a page on which people rank several systems' results"
    sub = commands.add_parser("study", help=about, description=about)
    sub.set_defaults(run=study)
    sub.add_argument("--bench", type=Path, required=True, help="COCOEE's folder, or one by `build`")
    sub.add_argument(
        "--results", nargs="+", required=True, metavar="NAME=FOLDER", help="systems; a folder alone goes by its name"
    )
    sub.add_argument("--out", type=Path, required=True, help="the study's folder: page/ to hand out, key.json to keep")
    sub.add_argument("-n", "--num-items", type=int, default=30, help="drawn at random, at most so many (default 30)")
    sub.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    sub.add_argument("--size", type=int, default=512, help="of the pictures' longer side, in pixels (default 512)")
    sub.add_argument("--quality", type=int, default=90, help="of the pictures' JPEGs (default 90)")
    sub.add_argument("--files", action="store_true", help="pictures beside the page instead of inside it")
    sub.add_argument("--title", default="Picture study", help="heads the page")
    sub.add_argument(
        "--send-to", default="", metavar="TEXT", help='ends "Save your answers and …", such as "mail them to a@b.org"'
    )
    sub.add_argument("--quiet", action="store_true", help="no progress bar")
    sub.add_argument("--force", action="store_true", help="replace an existing study")


def add_study_report(commands: argparse._SubParsersAction) -> None:
    """Adds the command `study-report`, whose `run` takes the arguments and returns the exit code."""
    about = "add up the answers to a study: mean ranks and preferences"
    sub = commands.add_parser("study-report", help=about, description=about)
    sub.set_defaults(run=study_report)
    sub.add_argument("key", type=Path, help="the study's key.json")
    sub.add_argument("answers", type=Path, nargs="+", help="the files that participants saved")
    sub.add_argument("--out", type=Path, required=True, help="folder of study-report.json and study-report.md")
    sub.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default 10000)")
    sub.add_argument("--level", type=float, default=0.95, help="of the intervals (default 0.95)")
    sub.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")


def named_folders(texts: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of texts NAME=FOLDER or FOLDER. ValueError for a name given twice."""
    folders: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        name, folder = (name, Path(folder)) if separator else (Path(text).name, Path(text))
        if name in folders:
            raise ValueError(f"two systems are called {name!r}; give NAME=FOLDER")
        folders[name] = folder
    return folders


def study(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pbe.evaluation.study.build import KEY, PAGE, StudyConfig, build_study
    from pbe.evaluation.test_set import Benchmark

    config = StudyConfig(args.num_items, args.size, args.quality, args.seed, args.title, args.send_to)
    systems, bench = named_folders(args.results), Benchmark(args.bench)
    count = min(args.num_items, len(bench.items))
    with tqdm(total=count, desc="study", disable=args.quiet, file=sys.stderr) as bar:
        made = build_study(bench, systems, args.out, config, args.files, args.force, bar.update)
    print(f"study {made}: {count} items, {len(systems)} systems")
    print(f"{args.out / PAGE}: hand out {'this folder' if args.files else 'this file'}")
    print(f"{args.out / KEY}: keep it, it tells whose each picture is")
    return 0


def study_report(args: argparse.Namespace) -> int:
    from pbe.evaluation.study import report as reports

    report = reports.study_report(args.key, args.answers, args.resamples, args.level, args.seed)
    reports.write_study_report(report, args.out)
    print(reports.markdown(report), end="")
    return 0
