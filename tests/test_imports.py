"""What a process imports: for help no heavy package, for an edit none that it does not use."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "torch",
    "torchvision",
    "lightning",
    "omegaconf",
    "numpy",
    "PIL",
    "ftfy",
    "transformers",
    "diffusers",
    "gradio",
}

HELP = """
import sys
from pbe.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("imported:", *sys.modules)
"""

EDITOR = """
import sys
from pathlib import Path
import pbe
from pbe.editing.loading import load_editor
load_editor(Path("demo"), "cpu", "float32")
pbe.edit
print("imported:", *sys.modules)
"""


def modules(program: str, *arguments: str) -> set[str]:
    """The modules that a fresh process has imported once it has run the program."""
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(run.stdout.splitlines()[-1].removeprefix("imported:").split())


@pytest.mark.parametrize("command", [[], ["app"], ["checkpoint"], ["train"]], ids=" ".join)
def test_help_needs_no_heavy_package(command):
    found = modules(HELP, *command, "--help")
    assert "pbe.cli" in found
    assert HEAVY.isdisjoint(found)


def test_an_editor_needs_only_torch_and_pillow():
    """Neither training's packages nor torch's compiler, which take as long to import as torch itself."""
    found = modules(EDITOR)
    assert {"torch", "PIL", "pbe.editing.edit"} <= found
    unused = HEAVY - {"torch", "numpy", "PIL"} | {"torch._dynamo", "torch._inductor", "sympy", "pandas"}
    assert unused.isdisjoint(found)
