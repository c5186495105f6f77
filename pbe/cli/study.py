"""`pbe evaluate study` and `study-report`: have people rank several systems' results, and add up what they say."""

from __future__ import annotations

import argparse
from pathlib import Path

from pbe.cli.flags import add_force
from pbe.cli.scoring import add_results, add_test_set, named_folders, progress


def add_study(p: argparse.ArgumentParser) -> None:
    """The arguments of `study`."""
    add_test_set(p, is_part_allowed=False)
    add_results(p)
    p.add_argument("-n", "--num-items", type=int, default=30, help="at most this many, drawn at random (default 30)")
    p.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    p.add_argument("--size", type=int, default=512, help="of the pictures' longer side, in pixels (default 512)")
    p.add_argument("--quality", type=int, default=90, help="of the pictures' JPEGs (default 90)")
    p.add_argument("--files", action="store_true", help="pictures beside the page instead of inside it")
    p.add_argument("--title", default="Picture study", help="heads the page")
    p.add_argument(
        "--send-to", default="", metavar="TEXT", help='ends "Save your answers and …", such as "mail them to a@b.org"'
    )
    add_force(p)


def add_study_report(p: argparse.ArgumentParser) -> None:
    """The arguments of `study-report`."""
    p.add_argument("key", type=Path, help="the study's key.json")
    p.add_argument("answers", type=Path, nargs="+", help="the files that participants saved")
    p.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (default 10000)")
    p.add_argument("--level", type=float, default=0.95, help="of the intervals (default 0.95)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")


def study(args: argparse.Namespace) -> int:
    from pbe.evaluation.study.build import KEY, PAGE, StudyConfig, build_study
    from pbe.evaluation.test_set import TestSet

    config = StudyConfig(args.num_items, args.size, args.quality, args.seed, args.title, args.send_to)
    systems, test_set = named_folders(args.results), TestSet(args.test_set)
    count = min(args.num_items, len(test_set.items))
    with progress(args, count, "study") as bar:
        made = build_study(test_set, systems, args.out, config, args.files, args.force, bar.update)
    print(f"study {made}: {count} items, {len(systems)} systems")
    print(f"{args.out / PAGE}: hand out {'this folder' if args.files else 'this file'}")
    print(f"{args.out / KEY}: keep it, it tells whose each picture is")
    return 0


def study_report(args: argparse.Namespace) -> int:
    from pbe.evaluation.bootstrap import Bootstrap
    from pbe.evaluation.study import report as reports

    bootstrap = Bootstrap(args.resamples, args.level, args.seed)
    report = reports.study_report(args.key, args.answers, bootstrap)
    reports.write_study_report(report, args.out)
    print(reports.markdown(report), end="")
    return 0
