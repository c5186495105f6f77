"""What surrounds the code: setup.py, the Makefile, the README's commands, the examples, and a quick `import pbe`."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PHOTOS = ("astronaut.jpg", "china.jpg", "coffee.png", "flower.jpg", "hopper.jpg")
MASKS = {f"{Path(name).stem}_mask.png": name for name in PHOTOS}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}


@pytest.fixture
def setup_arguments(monkeypatch) -> dict:
    """What setup.py hands to setuptools.setup, which need not be installed for this."""
    calls = []
    fake = SimpleNamespace(setup=lambda **arguments: calls.append(arguments), find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    (arguments,) = calls
    return arguments


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(statements) -> set[str]:
    """The distributions outside the standard library that these statements import."""
    modules = []
    for node in statements:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.append(node.module)
    tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"pbe"}
    return {DISTRIBUTIONS.get(top, top) for top in tops}


def test_version_is_the_package_s(setup_arguments):
    import pbe

    assert setup_arguments["version"] == pbe.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d+)?", pbe.__version__)


def test_entry_point_exists(setup_arguments):
    (script,) = setup_arguments["entry_points"]["console_scripts"]
    command, module, function = re.fullmatch(r"(\w+) = ([\w.]+):(\w+)", script).groups()
    assert command == "pbe"
    assert callable(getattr(import_module(module), function))


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in sources("pbe")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_module_imports_are_core_requirements(setup_arguments):
    """Importing a module needs no extra; page and server are each all of one, which their import names where it is
    missing."""
    core, extras = names(setup_arguments["install_requires"]), setup_arguments["extras_require"]
    allowed = {"app": names(extras["app"]), "serve": names(extras["serve"])}
    found = {path: imported(ast.parse(path.read_text(encoding="utf-8")).body) for path in sources("pbe")}
    extra = {str(path): packages - core - allowed.get(path.parent.name, set()) for path, packages in found.items()}
    assert {path: packages for path, packages in extra.items() if packages} == {}


def test_all_imports_are_required_somewhere(setup_arguments):
    declared = names(sum(setup_arguments["extras_require"].values(), setup_arguments["install_requires"]))
    found = {
        path: imported(ast.walk(ast.parse(path.read_text(encoding="utf-8")))) - declared
        for path in sources("pbe", "tools")
    }
    assert {str(path): packages for path, packages in found.items() if packages} == {}


def test_extras_named_in_messages_and_texts_exist(setup_arguments):
    paths = [*sources("pbe", "tools"), ROOT / "Makefile", ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = set()
    for path in paths:
        for extras in re.findall(r"(?:\bpbe|\.)\[([a-z]+(?:,[a-z]+)*)\]", path.read_text(encoding="utf-8")):
            named.update(extras.split(","))
    assert "test" in named  # the Makefile's: the search itself works
    assert named <= set(setup_arguments["extras_require"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(document):
    folders = "|".join(path.name for path in (ROOT / "pbe").iterdir() if path.is_dir())
    text = document.read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w./])((?:pbe|tests|examples|benchmarks|configs|tools)/[\w/]+\.(?:py|yaml|md|jpg|png))", text
    )
    named += [f"pbe/{name}" for name in re.findall(rf"(?<=`)((?:{folders})/[\w/]+\.py)(?=`)", text)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def commands(document: Path) -> Iterator[tuple[list[str], list[str]]]:
    """The commands `pbe …` of a document's shell blocks: their names, and their flags."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL))
    for line in re.findall(r"^pbe (.*)$", blocks.replace("\\\n", " "), re.MULTILINE):
        words = line.split(" #")[0].split()
        names = takewhile(re.compile(r"[a-z][a-z-]*").fullmatch, words)
        yield list(names), [word.split("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_of_a_document_s_commands_exist(document, capsys):
    from pbe.cli import main

    unknown = []
    for names, flags in commands(document):
        with pytest.raises(SystemExit):
            main([*names, "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        unknown += [f"{' '.join(names)} {flag}" for flag in flags if flag not in known]
    assert unknown == []


def test_the_readmes_commands_are_seen():
    seen = {" ".join(names) for names, _ in commands(ROOT / "README.md")}
    assert seen >= {"edit", "train", "evaluate run", "show-data"}


def test_readme_s_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL))
    named = set(re.findall(r"(?:^\$? ?|`)make ([a-z]+)", code, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_names_the_python_it_lacks(tmp_path):
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    run = subprocess.run(
        ["make", "test", "PYTHON=no-such-python"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "no-such-python not found: make PYTHON=" in run.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target, installed", [("demo", ["."]), ("docs", [".", ".[docs]"]), ("test", [".", ".[test]"])])
def test_make_installs_what_a_target_needs_and_no_more(tmp_path, target, installed):
    for name in ("Makefile", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    run = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.findall(r"pip install --editable '?([^'\n]+)'?$", run.stdout, re.MULTILINE) == installed


def test_ci_script_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_import_is_quick():
    """`import pbe` loads no heavy package: torch alone takes seconds."""
    program = "import sys, pbe; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "torchvision", "lightning", "omegaconf", "numpy", "PIL", "ftfy", "transformers", "diffusers"}
    assert heavy.isdisjoint(run.stdout.split())


def test_examples_are_listed_and_small():
    listed = set(
        re.findall(r"^\| `([\w.]+\.(?:png|jpg))`", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    pictures = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".png", ".jpg")}
    assert listed == pictures
    assert sum((EXAMPLES / name).stat().st_size for name in pictures) < 1.6e6


@pytest.mark.parametrize("mask, photo", MASKS.items())
def test_example_masks_fit_their_photos(mask, photo):
    with Image.open(EXAMPLES / mask) as drawn, Image.open(EXAMPLES / photo) as picture:
        assert drawn.mode == "L"
        assert drawn.size == picture.size
        values = np.asarray(drawn)
    assert set(np.unique(values)) == {0, 255}
    assert 0.05 < (values == 255).mean() < 0.5  # the share of a picture that the model was trained to repaint


@pytest.mark.parametrize("mask", MASKS)
def test_example_masks_are_what_the_script_draws(mask):
    script = runpy.run_path(str(EXAMPLES / "make_examples.py"))
    drawn = np.asarray(script[Path(mask).stem]())
    with Image.open(EXAMPLES / mask) as stored:
        # Pillow's releases may differ along the outline, about 1 % of the pixels.
        assert (drawn != np.asarray(stored)).mean() < 0.01
