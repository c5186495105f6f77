"""The documentation's site builds strictly: a broken link, anchor or reference fails, as does a stale docstring."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the site needs the extra docs")
pytest.importorskip("mkdocstrings", reason="the site needs the extra docs")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_the_readme_is_the_start(site):
    start = (site / "index.html").read_text(encoding="utf-8")
    assert "pbe: Paint by Example" in start
    assert 'src="images/demo.jpg"' in start
    assert 'href="editing/"' in start


def test_every_package_for_users_has_a_reference(site):
    not_for_import = {"app", "cli", "io", "serve", "weights"}
    packages = {path.name for path in (ROOT / "pbe").iterdir() if path.is_dir()} - not_for_import - {"__pycache__"}
    assert packages <= {path.name for path in (site / "api").iterdir()}
    reference = (site / "api" / "sampling" / "index.html").read_text(encoding="utf-8")
    assert 'id="pbe.sampling.guidance.guided_eps"' in reference


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text, page
        assert "fonts.googleapis" not in text, page
