"""Who imports whom: for help no heavy package, for an edit none that it does not use, and arrows that run one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pbe

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
    "fastapi",
}

# What the modules of each package may import of the others, also inside functions and for types alone.
EDITING = {"acceleration", "images", "sampling", "checkpoints", "models", "io"}
ARROWS = {
    "io": set(),
    "models": set(),
    "sampling": {"io"},
    "checkpoints": {"models", "io"},
    "images": {"models", "io"},
    "acceleration": {"checkpoints", "models", "io"},
    "data": {"images", "models", "io"},
    "export": {"acceleration", "checkpoints", "models", "io"},
    "editing": {"export", *EDITING},
    "batch": {"editing", *EDITING},
    "training": {"evaluation", "batch", "data", "editing", *EDITING},
    "evaluation": {"batch", "data", "editing", *EDITING},
    "baselines": {"evaluation", "batch", "data", "editing", *EDITING},
    "serve": {"batch", "editing", *EDITING},
    "app": {"serve", "batch", "editing", *EDITING},
    "cli": {"app", "serve", "baselines", "evaluation", "training", "batch", "data", "editing", "export", *EDITING},
}
# The only modules that know Lightning.
LIGHTNING = ("training/", "batch/distributed.py", "data/datamodule.py")

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


@pytest.mark.parametrize("command", [[], ["app"], ["serve"], ["checkpoint"], ["train"]], ids=" ".join)
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


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, and what it uses of `pbe` by its short names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pbe":
            yield pbe._HOMES.get(node.attr, "pbe")


def test_arrows_run_one_way():
    TopologicalSorter(ARROWS).prepare()  # raises for a circle
    packages = {path.parent.name for path in (ROOT / "pbe").glob("*/__init__.py")}
    assert packages == set(ARROWS), "a new package stands in ARROWS, and in the README's 'How it is built'"


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_what_lies_below_it(package):
    upward = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / "pbe" / package).rglob("*.py")
        for module in imported(path)
        if module.startswith("pbe.") and module.split(".")[1] in ARROWS.keys() - ARROWS[package] - {package}
    }
    assert sorted(upward) == []


def test_lightning_stays_where_runs_are_made():
    found = {
        str(path.relative_to(ROOT / "pbe"))
        for path in (ROOT / "pbe").rglob("*.py")
        if any(module.split(".")[0] == "lightning" for module in imported(path))
    }
    assert {name for name in found if not name.startswith(LIGHTNING)} == set()


def test_no_module_lies_loose_in_the_package():
    assert [path.name for path in (ROOT / "pbe").glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_what_uses_the_library_calls_no_command_from_code(folder):
    """Benchmarks and examples use the library as anyone's code would."""
    callers = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / folder).rglob("*.py")
        for module in imported(path)
        if module.startswith("pbe.cli")
    ]
    assert callers == []
