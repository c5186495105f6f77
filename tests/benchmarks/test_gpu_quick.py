"""The script for a lent GPU: what it asks for, and that it ends in time."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.sections import SECTIONS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_quick.sh"
# stands for python3: notes what it is asked to measure, and does nothing
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -m ]]; then
    printf '%s\\n' "${@:3}" -- >>"$COMMANDS"
    [[ $3 != table ]] || echo "all tables"
fi
"""


@pytest.mark.parametrize("quick", ["", "1"])
def test_it_asks_for_what_the_sections_take(quick, tmp_path):
    python, commands = tmp_path / "python3", tmp_path / "commands"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(commands), "OUT": str(tmp_path / "out")}
    subprocess.run(["bash", str(SCRIPT)], env=os.environ | variables | {"QUICK": quick}, check=True, timeout=60)
    *measured, (table, *_) = (one.strip().splitlines() for one in commands.read_text().split("--\n")[:-1])
    assert table == "table"
    parsed = []
    for section, *arguments in measured:
        args = SECTIONS[section].parser().parse_args(arguments)
        assert args.device == ("cpu" if quick else "cuda")
        assert 0 < args.minutes < (48 if quick else 8)
        parsed.append((section, args))
    edits = [(tuple(args.batch), *args.systems) for section, args in parsed if section == "edit"]
    many = 2 if quick else 16
    for batch in ((1,), (many,)):
        assert (batch, "pbe", "diffusers", "pbe, plain upsampling") in edits
        assert (batch, "pbe, compiled", "diffusers, compiled without trials") in edits
    (train,) = (args for section, args in parsed if section == "train")
    assert train.batch == [4, 16]
    assert (tmp_path / "out" / "tables.md").read_text() == "all tables\n"


def test_its_parts_take_at_most_eight_minutes_and_leave_few_files():
    script = SCRIPT.read_text()
    limits = re.findall(r"^    (?:end=\$\(\(times \* |edits |measure )(\d+)", script, re.MULTILINE)
    assert len(limits) == 7
    assert sum(map(int, limits)) <= 8 * 60
    assert len(limits) - 1 + len(["tables.md", "log.txt"]) <= 8
