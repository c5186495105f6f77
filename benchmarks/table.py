"""The Markdown of what the other sections measured: `python -m benchmarks table edit.json scaling.json`."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

ABOUT = ("command", "pbe", "versions", "threads", "device")
# what each section's JSON holds beside that
CONTENTS = {
    "edit": ("runs",),
    "train": ("runs", "fits"),
    "profile": ("run",),
    "scaling": ("index", "batch", "resolution"),
    "load": ("results",),
    "data": ("recipes",),
}


def read(path: Path) -> dict:
    """A run's JSON; ValueError if it is none, or not a whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    section = content.get("section") if isinstance(content, dict) else None
    if section not in (*CONTENTS,):
        sections = ", ".join(CONTENTS)
        raise ValueError(f"{path} is no run of python -m benchmarks: its 'section' should be one of {sections}")
    if lacking := [key for key in (*ABOUT, *CONTENTS[section]) if key not in content]:
        raise ValueError(f"{path} is not a whole run of {section!r}: it lacks {', '.join(lacking)}")
    return content


def document(content: dict) -> str:
    """A run as Markdown: its tables, the command and the versions."""
    section = content["section"]
    tables = import_module(f"benchmarks.{section}").tables(content)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = f"{content['device']}, {content['threads']} threads; pbe {content['pbe']}, {versions}"
    return f"## {section}\n\n{tables}\n\n`{content['command']}`\n\n{machine}\n"


def main(argv: Sequence[str]) -> int:
    """Prints the tables of all files; returns the exit code."""
    p = argparse.ArgumentParser(prog="benchmark.py table", description=__doc__)
    p.add_argument("files", nargs="+", type=Path, help="JSON that a section wrote with --out")
    args = p.parse_args(argv)
    try:
        print("\n".join(document(read(path)) for path in args.files), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
