"""The examples of docs/server.md, as they stand there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("flower.jpg", "flower_red.jpg", "flower_mask.png"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str, client) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return [block.replace("http://127.0.0.1:8000", str(client.base_url).rstrip("/")) for block in found]


def test_the_example_in_python(client, folder):
    (program,) = blocks("python", client)
    exec(program, {})
    for seed in (7, 8):
        assert Image.open(folder / f"edited-{seed}.png").size == (640, 427)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_examples_with_curl(client, folder):
    edit, jobs = (block for block in blocks("bash", client) if "curl " in block)
    subprocess.run(["bash", "-e", "-c", edit], check=True, cwd=folder)
    assert Image.open(folder / "edited.png").size == (640, 427)
    (folder / "edited.png").unlink()
    run = subprocess.run(["bash", "-e", "-c", jobs], check=True, cwd=folder, capture_output=True, text=True)
    assert "event: done" in run.stdout
    assert Image.open(folder / "edited.png").size == (640, 427)
    assert list(client.api.files.glob("*/")) == []
