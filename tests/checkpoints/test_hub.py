"""`hf:OWNER/NAME[/FILE][@REVISION]`, with a server on this machine in the hub's place."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TINY

import pbe
from pbe.batch.job import Job
from pbe.batch.provenance import identify
from pbe.checkpoints.adapters import open_adapter
from pbe.checkpoints.formats import hub
from pbe.checkpoints.formats.opening import find_checkpoint, read_state_dict
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_diffusers
from pbe.editing.loading import adapter

constants = pytest.importorskip("huggingface_hub.constants")

FOUR_LAYERS = replace(TINY, exemplar=replace(TINY.exemplar, vision=replace(TINY.exemplar.vision, num_layers=4)))
ROOT = Path(hub.__file__).parents[3]


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that downloads use: `repos[name][revision]` is a folder. Notes the files it gives."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.gated, self.given = {}, set(), []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        about = re.fullmatch(r"/api/models/(\w+/\w+)/(revision|tree)/(\w+)", path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path)
        repo, revision = (about[1], about[3]) if about else (file[1], file[2])
        revisions = self.server.repos.get(repo, {})
        folder = revisions.get(revision) or {sha_of(x): x for x in revisions.values()}.get(revision)
        if not revisions:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo in self.server.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not folder:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif about:
            files = [x for x in sorted(folder.rglob("*")) if x.is_file()]
            tree = [
                {"type": "file", "path": x.relative_to(folder).as_posix(), "size": x.stat().st_size, "oid": "0" * 40}
                for x in files
            ]
            answer = tree if about[2] == "tree" else {"id": repo, "sha": sha_of(folder), "siblings": []}
            self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        elif not (folder / file[3]).is_file():
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha_of(folder)})
        else:
            data = (folder / file[3]).read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": sha_of(folder)})
            if self.command == "GET":
                self.server.given.append(file[3])

    do_HEAD = do_GET

    def answer(self, status, data, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        """Says nothing."""


def sha_of(folder):
    """Of a commit: any 40 hexadecimal digits."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A diffusers folder with what else such repositories hold, and a file."""
    folder = tmp_path_factory.mktemp("models")
    save_diffusers(seeded_state(FOUR_LAYERS, 1), FOUR_LAYERS, folder / "main")
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"):
        (folder / "main" / name).write_bytes(b"a copy in another form")
    (folder / "main" / "README.md").write_text("# A model")
    (folder / "main" / "safety_checker").mkdir()
    (folder / "main" / "safety_checker" / "model.safetensors").write_bytes(b"not needed")
    shutil.copytree(folder / "main", folder / "v2")
    unet = folder / "v2" / "unet" / "diffusion_pytorch_model.safetensors"  # v2: a pickle alone, the VAE in halves
    torch.save(read_state_dict(unet), unet.with_suffix(".bin"))
    unet.unlink()
    vae = folder / "v2" / "vae"
    shutil.move(vae / "diffusion_pytorch_model.safetensors", vae / "diffusion_pytorch_model.fp16.safetensors")
    torch.save({"state_dict": seeded_state(FOUR_LAYERS, 2)}, folder / "main" / "model.ckpt")
    return folder


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    server = Hub()
    server.repos["someone/model"] = {"main": models / "main", "v2": models / "v2"}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.fetch.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    hub.fetch.cache_clear()


def same(model, seed):
    state = seeded_state(FOUR_LAYERS, seed)
    return all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_a_folder_brings_one_form_of_its_weights(server):
    model = pbe.load_model("hf:someone/model", "cpu", "float32")
    assert same(model, 1)
    weights = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model"}
    given = [name for name in server.given if not name.endswith(".json")]
    assert sorted(given) == sorted(f"{name}.safetensors" for name in weights)
    assert find_checkpoint(Path("hf:someone/model")) == find_checkpoint("hf:someone/model")
    assert identify(Path("hf:someone/model"), torch.float32).crc32


def test_a_revision_with_other_forms(server):
    assert same(pbe.load_model("hf:someone/model@v2", "cpu", "float32"), 1)
    given = sorted(name for name in server.given if not name.endswith(".json"))
    expected = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert given == ["image_encoder/model.safetensors", *expected]


def test_a_file_and_its_hash(server, models):
    digest = hashlib.sha256((models / "main" / "model.ckpt").read_bytes()).hexdigest()
    for text in ("", "@main", f"@main#sha256={digest}", f"#sha256={digest.upper()}"):
        assert same_file(find_checkpoint(f"hf:someone/model/model.ckpt{text}"), models / "main" / "model.ckpt")
    assert server.given == ["model.ckpt"]  # once, then from the cache
    with pytest.raises(ValueError, match=f"model.ckpt has the sha256 {digest}"):
        find_checkpoint(f"hf:someone/model/model.ckpt#sha256={'0' * 64}")


def same_file(a, b):
    return a.read_bytes() == b.read_bytes()


def test_adapters_come_with_their_settings(server, tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3}))
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(1, 1)}, folder / "adapter_model.bin")
    server.repos["someone/lora"] = {"main": folder}
    for name in ("hf:someone/lora", "hf:someone/lora/adapter_model.bin"):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        file, settings = open_adapter(name)
        assert settings == {"lora_alpha": 3}
        assert list(file.names()) == ["base_model.model.x.lora_A.weight"]
    assert adapter("hf:someone/lora@main:0.5") == (Path("hf:someone/lora@main"), 0.5)
    assert adapter("hf:someone/lora") == (Path("hf:someone/lora"), 1.0)
    files = {"image": "a.png", "exemplar": ("b.png",), "out": "c.png"}
    row = Job(**files, adapters=("hf:someone/lora@main:0.5", "d.bin"), folder=Path("rows"))
    assert row.with_adapters(()) == ((Path("hf:someone/lora@main"), 0.5), (Path("rows/d.bin"), 1.0))
    weights = identify(Path("demo"), torch.float32, [("hf:someone/lora/adapter_model.bin", 0.5)])
    assert weights.adapters[0]["file"] == "adapter_model.bin"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hf:someone/nothing", "the hub has no such model"),
        ("hf:someone/nothing/model.ckpt", "the hub has no such model"),
        ("hf:someone/model/other.ckpt", "the model has no such file"),
        ("hf:someone/model@v3", "the model has no such revision"),
        ("hf:someone/model/model.ckpt@v3", "the model has no such revision"),
        ("hf:someone/gated", "accept its terms"),
        ("hf:someone/gated/model.ckpt", "accept its terms"),
        ("hf:some one/model", "Repo id must"),
    ],
)
def test_what_the_hub_does_not_have(server, models, text, why):
    server.repos["someone/gated"] = {"main": models / "main"}
    server.gated.add("someone/gated")
    with pytest.raises(OSError, match=why) as caught:
        find_checkpoint(text)
    assert str(caught.value).startswith(f"{text}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["hf:model", "hf:a/b#sha256=12", f"hf:a/b#sha256={'0' * 64}", "hf:", "hf:a/b@", "hf:a/b/f#md5=0"]
)
def test_texts_of_another_form(text):
    with pytest.raises(ValueError, match="hf:OWNER/NAME"):
        find_checkpoint(text)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="needs the extra hub"):
        find_checkpoint("hf:someone/model")


@pytest.mark.slow
def test_offline_the_cache_is_all_there_is(server, tmp_path, monkeypatch):
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        for text in ("hf:someone/model", "hf:someone/model/model.ckpt"):
            with pytest.raises(OSError, match="not in the cache, and the hub is not reached"):
                find_checkpoint(text)
    found = find_checkpoint("hf:someone/model")
    given, address = list(server.given), f"http://127.0.0.1:{unused_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    hub.fetch.cache_clear()
    assert find_checkpoint("hf:someone/model") == found  # as where there is no network

    variables = {"HF_ENDPOINT": server.address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    program = "import sys; from pbe.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "checkpoint", "inspect", "hf:someone/model"]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Paint by Example, diffusers folder" in run.stdout
    assert server.given == given


def unused_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
