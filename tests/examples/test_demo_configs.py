"""The configs of the model in the box: the commands in their comments exist, and each run begins where another ends."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from pbe.cli import COMMANDS
from pbe.training.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("demo", "ablation/tiny") for path in (ROOT / "configs" / folder).glob("*.yaml"))
names = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")


@names
def test_commands_in_comments_exist(path):
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for line in comments:
        assert all((ROOT / file).is_file() for file in re.findall(r"configs/\S+\.yaml", line)), line
        if command := re.match(r"#   (pbe|python -m) (\S+)", line):
            program, what = command.groups()
            assert what in COMMANDS if program == "pbe" else find_spec(what), line


@cache
def configs():
    read = (load_config([str(path)]) for path in [*FILES, ROOT / "configs/vae.yaml"])
    return {config.run: config for config in read}


@names
def test_runs_begin_with_what_another_run_saves(path):
    for run, step in re.findall(r"(runs/\S+)/checkpoints/step-(\d+)\.ckpt", path.read_text()):
        saving = configs()[run]
        assert int(step) % saving.checkpoint.every_n_steps == 0 or int(step) == saving.trainer["max_steps"], step
        assert int(step) <= saving.trainer["max_steps"], step
    if path.parent.name == "demo":
        assert load_config([str(path)]).run == f"runs/demo_{path.stem}"
