"""Servers in threads of the tests' own process, and pictures to send."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from fakes import SERVED
from PIL import Image

import pbe
from pbe.batch.provenance import Weights

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")
from pbe.serve import serving
from pbe.serve.api import build_api

WEIGHTS = Weights("tiny.ckpt", "00000000", "float32")


@pytest.fixture(scope="session")
def model(tiny_checkpoint):
    return pbe.prepare_for_inference(pbe.load_model(tiny_checkpoint, device="cpu"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """A photo of 96x80, its mask, the same as OpenAI has it, and an exemplar."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = {name: folder / f"{name}.png" for name in ("image", "mask", "hole", "exemplar")}
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (80, 96, 3), dtype=np.uint8)).save(paths["image"])
    Image.fromarray(draw.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(paths["exemplar"])
    repaint = np.zeros((80, 96), dtype=bool)
    repaint[20:50, 16:60] = True
    Image.fromarray(repaint).save(paths["mask"])
    Image.fromarray(np.dstack([np.full((80, 96, 3), 255), np.where(repaint, 0, 255)]).astype(np.uint8)).save(
        paths["hole"]
    )
    return paths


@pytest.fixture(scope="session")
def serve(model) -> Callable[..., object]:
    @contextmanager
    def serve(files: Path, **options) -> Iterator[httpx.Client]:
        """A client of a server, which is stopped at the end; `client.api` is the server's inside."""
        app = build_api(model, WEIGHTS, files, **{"settings": SERVED, **options})
        config, listener = serving.configured(app, "127.0.0.1", 0)
        server = serving.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            client.api, client.server = app.state.api, server
            yield client
        server.should_exit = True
        thread.join(60)
        listener.close()
        assert not thread.is_alive()

    return serve


@pytest.fixture(scope="module")
def client(serve, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("files")) as client:
        yield client
