"""The Markdown of what the sections measured: `python -m benchmarks table edit.json scaling.json`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import about
from benchmarks.sections import SECTIONS

# what each section's JSON holds beside `about`
CONTENTS = {
    "edit": ("runs",),
    "cost": ("runs",),
    "train": ("runs", "fits"),
    "profile": ("run",),
    "scaling": ("index", "batch", "resolution"),
    "load": ("results",),
    "data": ("recipes",),
}


def read(path: Path) -> dict[str, Any]:
    """A run's JSON; ValueError if it is another file's, or incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    section = content.get("section") if isinstance(content, dict) else None
    if section not in (*CONTENTS,):
        raise ValueError(
            f"{path} is not from python -m benchmarks: its 'section' is {section!r}, not one of {', '.join(CONTENTS)}"
        )
    if missing := [key for key in (*about(section, ()), *CONTENTS[section]) if key not in content]:
        raise ValueError(f"{path} is not a whole run of {section!r}: it lacks {', '.join(missing)}")
    return content


def document(content: dict[str, Any]) -> str:
    """A run as Markdown: its tables, the command and the versions."""
    section = content["section"]
    tables = SECTIONS[section].tables(content)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = f"{content['device']}, {content['threads']} threads; pbe {content['pbe']}, {versions}"
    return f"## {section}\n\n{tables}\n\n`{content['command']}`\n\n{machine}\n"


def main(argv: Sequence[str]) -> int:
    """Prints the tables of all files; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks table", description=__doc__)
    p.add_argument("files", nargs="+", type=Path, help="JSON that a section wrote with --out")
    args = p.parse_args(argv)
    try:
        print("\n".join(document(read(path)) for path in args.files), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
