"""The server over HTTP: OpenAI's endpoint with OpenAI's client, edits with all settings, jobs, and what is refused."""

import base64
import io
import json
import re
import struct
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from fakes import SERVED, sent
from PIL import Image

import pbe
from pbe.batch.provenance import read_provenance
from pbe.cli.serve import main
from pbe.editing.settings import SETTINGS as ALL_SETTINGS
from pbe.serve.limits import Limits

pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = {"steps": "1000", "sampler": "ddim"}
ERROR = {"message", "type", "param", "code"}


def decoded(data: str | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)))


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two pictures are the same to rounding."""
    difference = np.abs(a.astype(int) - b)
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


def edited(model, pictures, **changes) -> list[np.ndarray]:
    settings = {**vars(SERVED), **changes}
    results = pbe.edit(model, pictures["image"], pictures["mask"], pictures["exemplar"], **settings)
    return [np.asarray(result) for result in results]


def wait_for(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def begin(client, pictures, **texts) -> str:
    """Queues a job; its address."""
    answer = client.post("/v1/edits", files=sent(pictures), data=texts, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.headers["location"]


def status(client, job: str) -> str:
    return client.get(job).json()["status"]


# --- OpenAI's client --------------------------------------------------------------------------------------


@pytest.fixture
def ask(client, pictures):
    """OpenAI's client asks for an edit, changed."""
    asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)

    def ask(images=("image", "exemplar"), mask="mask", **changes):
        files = [pictures[name].open("rb") for name in images]
        given = {"mask": pictures[mask].open("rb")} if mask else {}
        return asking.images.edit(model="gpt-image-1", prompt="a flower", image=files, **given, **changes)

    return ask


@pytest.mark.parametrize("mask", ["mask", "hole"])  # white, or transparent
def test_openai_s_client_works_unchanged(ask, model, pictures, mask):
    answer = ask(mask=mask, n=2, size="auto", response_format="b64_json")
    results = [decoded(one.b64_json) for one in answer.data]
    expected = edited(model, pictures, num_images=2)
    assert len(results) == 2
    assert all(close(*both) for both in zip(results, expected, strict=True))
    assert [one.seed for one in answer.data] == [321, 322]


def test_an_edit_s_settings_go_beside_openai_s_fields(ask, model, pictures):
    (one,) = ask(extra_body={"seed": 5, "guidance": 2}).data
    assert close(decoded(one.b64_json), edited(model, pictures, seed=5, guidance=2)[0])


def test_further_pictures_are_exemplars_too(ask, model, pictures):
    (one,) = ask(images=("image", "exemplar", "hole")).data
    exemplars = [pictures["exemplar"], pictures["hole"]]
    (expected,) = pbe.edit(model, pictures["image"], pictures["mask"], exemplars, **vars(SERVED))
    assert close(decoded(one.b64_json), np.asarray(expected))


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"size": "1024x1024"}, "size", "size must be 'auto' here, got '1024x1024'"),
        ({"response_format": "url"}, "response_format", "must be 'b64_json' here, got 'url'"),
        ({"output_format": "webp"}, "output_format", "must be 'png' here"),
        ({"n": 0}, "n", "n must be a whole number from 1 to 8, got '0'"),
        ({"images": ("image",)}, "image", "given twice, the photo and the exemplar, got 1"),
        ({"mask": None}, None, "give one of mask, box, polygon and select"),
        ({"mask": "exemplar"}, "mask", "is 20x30, but the picture it belongs to is 96x80"),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown field 'colour'"),
        ({"extra_body": {"steps": "many"}}, "steps", "steps must be a whole number from 1 to 1000, got 'many'"),
    ],
)
def test_errors_have_openai_s_form(ask, changes, param, message):
    with pytest.raises(openai.BadRequestError) as error:
        ask(**changes)
    body = error.value.body
    assert set(body) == ERROR
    assert (body["type"], body["param"]) == ("invalid_request_error", param)
    assert message in body["message"]


# --- edits with all settings ------------------------------------------------------------------------------


def test_an_edit_is_that_of_the_library(client, model, pictures, tmp_path):
    texts = {"seed": 7, "sampler": "ddpm", "window": "full", "composite": "false", "num_images": 2}
    answer = client.post("/v1/edits", files=sent(pictures), data=texts)
    assert answer.status_code == 200
    assert [one["seed"] for one in answer.json()["data"]] == [7, 8]
    expected = edited(model, pictures, seed=7, sampler="ddpm", window="full", composite=False, num_images=2)
    for one, right in zip(answer.json()["data"], expected, strict=True):
        assert close(decoded(one["b64_json"]), right)
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.json()["data"][1]["b64_json"]))
    provenance = read_provenance(tmp_path / "a.png")
    assert (provenance["seed"], provenance["sampler"], provenance["checkpoint"]) == (8, "ddpm", "tiny.ckpt")


def test_the_answer_is_a_picture_where_that_is_asked_for(client, model, pictures):
    answer = client.post("/v1/edits", files=sent(pictures), headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert close(decoded(answer.content), edited(model, pictures)[0])


def test_boxes_and_several_exemplars(client, model, pictures):
    files = [*sent(pictures, "image", "exemplar"), ("exemplar", ("hole.webp", pictures["hole"].read_bytes()))]
    texts = {"box": "10,20,50,60", "exemplar_weights": "1,3"}
    answer = client.post("/v1/edits", files=files, data=texts, headers={"Accept": "image/png"})
    exemplars = [pictures["exemplar"], pictures["hole"]]
    right = pbe.edit(model, pictures["image"], (10, 20, 50, 60), exemplars, exemplar_weights=(1, 3), **vars(SERVED))
    assert close(decoded(answer.content), np.asarray(right[0]))


@pytest.fixture
def two(pictures) -> list[tuple[str, tuple[str, bytes]]]:
    """A form's files for two regions, the second of which has two exemplars."""
    mask, second = io.BytesIO(), np.zeros((80, 96), bool)
    second[50:75, 60:90] = True
    Image.fromarray(second).save(mask, "PNG")
    names = {"mask_2": mask.getvalue(), "exemplar_2": pictures["hole"].read_bytes()}
    files = [*sent(pictures), *((name, ("a.png", content)) for name, content in names.items())]
    return [*files, ("exemplar_2", ("b.png", pictures["exemplar"].read_bytes()))]


def regions_of(pictures, two) -> list[pbe.Region]:
    mask = Image.open(io.BytesIO(dict(two)["mask_2"][1]))
    exemplars = [pictures["hole"], pictures["exemplar"]]
    first = pbe.Region(pictures["mask"], pictures["exemplar"])
    return [first, pbe.Region(mask, exemplars, exemplar_weights=(3, 1), guidance=2)]


def test_regions_are_those_of_the_library(client, model, pictures, two):
    texts = {"seed": 7, "guidance_2": 2, "exemplar_weights_2": "3,1"}
    answer = client.post("/v1/edits", files=two, data=texts, headers={"Accept": "image/png"})
    settings = {**vars(SERVED), "seed": 7}
    (expected,) = pbe.edit_regions(model, pictures["image"], regions_of(pictures, two), **settings)
    assert close(decoded(answer.content), np.asarray(expected))


def test_openai_s_masks_of_regions_are_transparent_too(client, model, pictures, two):
    """The first as OpenAI has it, the second white."""
    files = [("image[]", two[0][1]), ("image[]", two[2][1]), ("mask", sent(pictures, "hole")[0][1]), *two[3:]]
    texts = {"guidance_2": 2, "exemplar_weights_2": "3,1"}
    (one,) = client.post("/v1/images/edits", files=files, data=texts).json()["data"]
    (expected,) = pbe.edit_regions(model, pictures["image"], regions_of(pictures, two), **vars(SERVED))
    assert close(decoded(one["b64_json"]), np.asarray(expected))


@pytest.mark.parametrize(
    ("left", "texts", "param", "message"),
    [
        (["exemplar_2"], {}, "exemplar_2", "exemplar_2 missing"),
        (["mask_2"], {}, None, "region 2: mask, box, polygon or select missing"),
        (["mask_2"], {"box_2": "1,2,3"}, "box_2", "box_2 must be a box x0,y0,x1,y1, got '1,2,3'"),
        ([], {"steps_2": "4"}, "steps_2", "unknown field 'steps_2'; known are .*more regions mask_2"),
        ([], {"extend": "left,9"}, "extend", "extend is for one mask"),
    ],
)
def test_what_is_wrong_with_a_region_is_said(client, two, left, texts, param, message):
    files = [(name, file) for name, file in two if name not in left]
    answer = client.post("/v1/edits", files=files, data=texts)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert re.search(message, answer.json()["error"]["message"])


def test_a_selection_without_opencv_names_the_extra(client, pictures, monkeypatch):
    monkeypatch.delitem(sys.modules, "pbe.images.grabcut", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    for name, others in (("select", {}), ("exemplar_select", {"box": "1,2,30,40"})):
        answer = client.post("/v1/edits", files=sent(pictures, "image", "exemplar"), data={name: "9,9", **others})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert "OpenCV, the extra masks: pip install -e .[masks]" in error["message"]


def test_every_setting_is_a_documented_field(client):
    for path in ("/v1/edits", "/v1/images/edits"):
        operation = client.get("/openapi.json").json()["paths"][path]["post"]
        fields = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
        assert set(ALL_SETTINGS) <= set(fields)
        assert all(fields[name]["description"] for name in ALL_SETTINGS)
    assert fields["sampler"]["enum"][:2] == ["ddim", "plms"]
    assert (fields["steps"]["type"], fields["steps"]["minimum"], fields["steps"]["maximum"]) == ("integer", 1, 1000)
    page = client.get("/docs").text
    assert all(f"<th>{name}<" in page for name in ALL_SETTINGS)
    assert "<th>exemplar_2<" in page
    assert {f"mask_{n}" for n in range(2, 10)} <= set(fields)
    assert fields["exemplar_9"]["description"] == "As exemplar, of region 9."
    assert "http://" not in page
    assert "https://" not in page


PNG = b"\x89PNG\r\n\x1a\n"


def huge_png() -> bytes:
    """The beginning of a picture of 64000x64000 pixels, which nobody may decode."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 64000, 64000, 8, 2, 0, 0, 0)
    return PNG + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize(
    ("changes", "texts", "param", "message"),
    [
        ({"image": b"no picture"}, {}, "image", "image is not a picture; use PNG, JPEG"),
        ({"exemplar": b""}, {}, "exemplar", "exemplar is not a picture"),
        ({"mask": PNG}, {}, "mask", "mask is not a picture|mask is damaged"),
        ({"image": huge_png()}, {}, "image", "image is (too large|64000x64000)"),
        ({"image": None}, {}, "image", "image missing"),
        ({"frob": b"a"}, {}, "frob", "unknown field 'frob'"),
        ({"steps": b"4"}, {}, "steps", "steps must be text"),
        ({}, {"exemplar": "a.png"}, "exemplar", "exemplar must be a file"),
        ({}, {"out": "/etc/passwd"}, "out", "unknown field 'out'"),
        ({"adapters": b"a"}, {}, "adapters", "unknown field 'adapters'"),
        ({}, {"seed": ["1", "2"]}, "seed", "seed is given twice"),
        ({}, {"box": "1,2,3,4"}, None, "give one of mask, box, polygon and select, got mask and box"),
        ({}, {"sampler": "ddim", "eta": "2"}, "eta", "eta must be a number from 0 to 1, got '2'"),
        ({}, {"num_images": "9"}, "num_images", "from 1 to 8, got '9'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(client, pictures, changes, texts, param, message):
    files = dict(sent(pictures)) | {
        name: ("a.png", content) for name, content in changes.items() if content is not None
    }
    files = {name: file for name, file in files.items() if changes.get(name, b"") is not None}
    answer = client.post("/v1/edits", files=files, data=texts)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert re.search(message, error["message"])
    assert "/" not in error["message"]
    assert [path for path in client.api.files.iterdir() if path.name != ".lock"] == []


def test_wrong_requests_are_answered_in_the_same_form(client, pictures):
    answers = {
        404: client.get("/v1/none"),
        405: client.get("/v1/edits"),
        411: client.post(
            "/v1/edits", content=iter([b"a"]), headers={"Content-Type": "multipart/form-data; boundary=x"}
        ),
        415: client.post("/v1/edits", json={"image": "a.png"}),
        400: client.post("/v1/edits", content=b"x", headers={"Content-Type": "multipart/form-data"}),
        403: client.get("/healthz", headers={"Host": "evil.example"}),
    }
    for code, answer in answers.items():
        assert answer.status_code == code
        assert set(answer.json()["error"]) == ERROR
    assert client.get("/healthz", headers={"Origin": "http://evil.example"}).status_code == 403
    for path in (
        "/v1/jobs/none",
        "/v1/jobs/none/events",
        "/v1/jobs/..%2f..%2fetc",
        "/v1/jobs/none/results/0",
        "/v1/jobs/none/results/x",
    ):
        assert client.get(path).status_code == 404
    assert client.get("/v1/edits").headers["allow"] == "POST"


def test_what_nobody_foresaw_is_in_the_log_alone(client, pictures, monkeypatch, caplog):
    def broken(*_):
        raise LookupError("a secret")

    monkeypatch.setattr("pbe.serve.uploads.read_inputs", broken)
    answer = client.post("/v1/edits", files=sent(pictures))
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")
    monkeypatch.setattr(client.api.jobs, "new_folder", broken)
    answer = client.post("/v1/edits", files=sent(pictures))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert caplog.text.count("LookupError: a secret") == 2


# --- jobs -------------------------------------------------------------------------------------------------


def test_a_job_tells_how_far_it_is_and_keeps_its_results(client, model, pictures):
    job = begin(client, pictures, num_images=2, steps=6)
    with client.stream("GET", f"{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.partition(": ") for line in answer.iter_lines() if line]
    events = [(name[2], json.loads(data[2])) for name, data in zip(lines[::2], lines[1::2], strict=True)]
    assert all(name == state["status"] for name, state in events)
    assert [name for name, _ in events][-1] == "done"
    steps = [state["step"] for _, state in events]
    assert steps == sorted(steps)
    assert (steps[-1], events[-1][1]["steps"]) == (6, 6)
    previews = [state["preview"] for _, state in events if "preview" in state]
    assert all(len(preview) == 2 and decoded(preview[0]).ndim == 3 for preview in previews)
    state = client.get(job).json()
    assert state == events[-1][1]
    assert [one["seed"] for one in state["results"]] == [321, 322]
    for one, right in zip(state["results"], edited(model, pictures, num_images=2, steps=6), strict=True):
        answer = client.get(one["url"])
        assert answer.headers["content-type"] == "image/png"
        assert close(decoded(answer.content), right)
    assert client.get(f"{job}/results/2").status_code == 404
    folder = client.api.files / state["id"]
    assert folder.is_dir()
    assert client.delete(job).status_code == 204
    assert client.get(job).status_code == 404
    assert not folder.exists()


def test_a_job_that_fails_says_why(client, pictures):
    files = [*sent(pictures, "image", "exemplar"), ("mask", ("mask.png", pictures["exemplar"].read_bytes()))]
    answer = client.post("/v1/edits", files=files, headers={"Prefer": "respond-async"})
    job = answer.headers["location"]
    wait_for(lambda: status(client, job) == "failed")
    error = client.get(job).json()["error"]
    assert "is 20x30, but the picture it belongs to is 96x80" in error["message"]
    assert set(error) == ERROR
    client.delete(job)


def test_a_deleted_job_ends_within_a_step(client, pictures):
    running = begin(client, pictures, **SLOW)
    waiting = begin(client, pictures, **SLOW, seed=4, margin=0.2)
    wait_for(lambda: client.get(running).json()["step"] > 0)
    assert status(client, waiting) == "queued"
    for job in (waiting, running):
        assert client.delete(job).status_code == 204
    wait_for(lambda: not client.api.engine.running, 5)
    wait_for(lambda: not list(client.api.files.glob("*/")), 5)
    metrics = client.get("/metrics").text
    assert 'pbe_edits_total{status="cancelled"} 2.0' in metrics
    assert "pbe_edits_waiting 0.0" in metrics


def test_an_edit_whose_client_has_left_ends(client, pictures):
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/edits", files=sent(pictures), data=SLOW, timeout=0.5)
    wait_for(lambda: not client.api.engine.running, 10)
    assert client.get("/healthz").json() == {"status": "ok", "version": pbe.__version__, "checkpoint": "tiny.ckpt"}


def test_equal_edits_that_wait_are_run_together(client, model, pictures):
    running = begin(client, pictures, **SLOW)
    wait_for(lambda: client.api.engine.running)
    jobs = [begin(client, pictures, seed=seed, window="full") for seed in (1, 2, 3)]
    client.delete(running)
    wait_for(lambda: all(status(client, job) == "done" for job in jobs))
    for job, seed in zip(jobs, (1, 2, 3), strict=True):
        assert close(
            decoded(client.get(f"{job}/results/0").content), edited(model, pictures, seed=seed, window="full")[0]
        )
        client.delete(job)
    assert 'pbe_batch_edits_bucket{le="2.0"}' in client.get("/metrics").text
    assert client.api.metrics.registry.get_sample_value("pbe_batch_edits_sum") >= 9


# --- limits -----------------------------------------------------------------------------------------------


def test_large_bodies_are_refused_before_they_are_read(serve, pictures, tmp_path):
    with serve(tmp_path, limits=Limits(max_body=1)) as client:
        files = {"image": ("a.png", bytes(2 * 2**20))}
        answer = client.post("/v1/edits", files=files)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
        assert "1 MB" in answer.json()["error"]["message"]


def test_a_full_queue_asks_to_come_again(serve, pictures, tmp_path):
    with serve(tmp_path, limits=Limits(max_waiting=1, grace=1)) as client:
        jobs = [begin(client, pictures, **SLOW)]
        wait_for(lambda: client.api.engine.running)
        jobs += [begin(client, pictures, **SLOW)]
        answer = client.post("/v1/edits", files=sent(pictures))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            asking.images.edit(model="a", prompt="a", image=[pictures["image"], pictures["exemplar"]])
        for job in jobs:
            client.delete(job)


def test_an_edit_may_take_only_so_long(serve, pictures, tmp_path):
    with serve(tmp_path, limits=Limits(max_seconds=1)) as client:
        answer = client.post("/v1/edits", files=sent(pictures), data=SLOW)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "too_long")


def test_the_oldest_finished_jobs_make_room(serve, pictures, tmp_path):
    with serve(tmp_path) as client:
        jobs = []
        for seed in range(3):
            jobs.append(begin(client, pictures, seed=seed))
            wait_for(lambda: status(client, jobs[-1]) == "done")
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        client.api.jobs.quota = used - 1
        jobs.append(begin(client, pictures))
        found = [client.get(job).status_code for job in jobs]
        assert found == [404, 200, 200, 200]
        wait_for(lambda: status(client, jobs[-1]) == "done")
        client.api.jobs.quota = 0
        running = begin(client, pictures, **SLOW)
        answer = client.post("/v1/edits", files=sent(pictures))
        assert answer.status_code == 429
        assert client.get(running).status_code == 200
        client.delete(running)


@pytest.mark.slow
def test_fifty_clients_at_once_lose_nothing(client, model, pictures):
    def ask(seed: int) -> np.ndarray:
        headers = {"Accept": "image/png"}
        answer = httpx.post(
            f"{client.base_url}/v1/edits",
            files=sent(pictures),
            data={"seed": seed, "steps": 1},
            headers=headers,
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
        return decoded(answer.content)

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(ask, range(50)))
    expected = edited(model, pictures, seed=0, num_images=50, steps=1)
    assert all(close(*both) for both in zip(results, expected, strict=True))
    assert list(client.api.files.glob("*/")) == []


# --- the token --------------------------------------------------------------------------------------------


def test_a_token_lets_in_those_who_have_it(serve, pictures, tmp_path):
    with serve(tmp_path, token="sesame") as client:
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
            answer = client.post("/v1/edits", files=sent(pictures), headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path, code in (("/healthz", 200), ("/docs", 200), ("/metrics", 401), ("/v1/jobs/a", 401)):
            assert client.get(path, headers={"Host": "behind.a.proxy"}).status_code == code
        for key, error in (("sesame", openai.BadRequestError), ("wrong", openai.AuthenticationError)):
            asking = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0)
            with pytest.raises(error):
                asking.images.edit(model="a", prompt="a", image=[pictures["image"], pictures["exemplar"]])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("demo --host 0.0.0.0", "other machines reach this --host: give one of ASCII characters, by --token-file FILE"),
        ("demo --token-file empty", "--token-file empty holds no token"),
        ("demo --token-file none", "none"),
        ("demo --max-waiting 0", "--max-waiting must be a whole number of at least 1, got '0'"),
        ("none.ckpt", "there is no checkpoint none.ckpt"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PBE_TOKEN", raising=False)
    (tmp_path / "empty").write_text("\n")
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
