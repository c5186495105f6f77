"""What the page's server refuses, forgets and gives up: hosts, passwords, sizes, files, edits that nobody waits for."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from fakes import at_once
from PIL import Image

import pbe
from pbe.batch.provenance import Weights
from pbe.sampling import StepInfo

gr = pytest.importorskip("gradio", reason="the page needs the extra app")
from gradio_client import Client, handle_file  # noqa: E402

from pbe.app import serving  # noqa: E402
from pbe.app.page import build_page  # noqa: E402
from pbe.cli.app import credentials, interrupt, main  # noqa: E402
from pbe.io.signals import handling  # noqa: E402
from pbe.serve import guard, uploads  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Weights("tiny.ckpt", "00000000", "float32")
SETTINGS = {"guidance": 3, "steps": 4, "seed": 7, "num_images": 1, "sampler": "ddim"}
UPLOAD = "/gradio_api/upload"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return pbe.load_model(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def no_telemetry():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield


@pytest.fixture(scope="module")
def folder():
    with serving.files_of_page() as files:
        yield files


@pytest.fixture(scope="module")
def address(model, folder):
    page = build_page(model, WEIGHTS)
    yield serving.serve(page, port=free_port(), allow_hosts=("Paint.Example",), files=folder)
    page.close(verbose=False)


@pytest.fixture
def http(address):
    with httpx.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """An image of 100x80, its mask, an exemplar."""
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "mask", "exemplar")}
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(paths["image"])
    mask = Image.new("L", (100, 80))
    mask.paste(255, (20, 16, 60, 48))
    mask.save(paths["mask"])
    Image.new("RGB", (20, 30), "red").save(paths["exemplar"])
    return paths


def submit(client: Client, files: dict[str, Path], **changes):
    handed = {name: handle_file(path) for name, path in files.items()}
    return client.submit(**handed, **{**SETTINGS, **changes}, api_name="/edit")


# --- hosts and origins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "0.0.0.0", "[", ""])
def test_a_foreign_host_is_refused(http, host):
    response = http.get("/config", headers={"Host": host})
    assert (response.status_code, host in response.text) == (403, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "paint.example:80"])
def test_the_page_s_own_hosts_are_not(http, host):  # another port: a tunnel's
    assert http.get("/config", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "http://localhost", "x"])
def test_a_foreign_origin_uploads_nothing(http, folder, origin):
    before = set(folder.rglob("*"))
    response = http.post(UPLOAD, files={"files": ("a.png", b"a")}, headers={"Origin": origin})
    assert (response.status_code, origin in response.text) == (403, True)
    assert set(folder.rglob("*")) == before


@pytest.mark.parametrize("origin", [None, "https://paint.example"])
def test_the_page_s_own_origins_upload(http, origin):
    response = http.post(
        UPLOAD, files={"files": ("a.png", b"a")}, headers={"Origin": origin or str(http.base_url)[:-1]}
    )
    assert response.status_code == 200


# --- passwords --------------------------------------------------------------------------------------------


def test_a_visitor_gives_the_password(model, files):
    page = build_page(model, WEIGHTS)
    address = serving.serve(page, port=free_port(), auth=("ann", "s:cret"))
    for path in ("config", "gradio_api/info"):
        assert httpx.get(address + path).status_code == 401
    assert httpx.post(address + UPLOAD[1:], files={"files": ("a.png", b"a")}).status_code == 401
    with pytest.raises(Exception, match=r"[Cc]redentials|[Ll]ogin|auth"):
        Client(address, auth=("ann", "wrong"), verbose=False)
    assert submit(Client(address, auth=("ann", "s:cret"), verbose=False), files).result(timeout=60)
    page.close(verbose=False)


def test_where_the_password_stands(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("ann:of a file\n")
    monkeypatch.delenv("PBE_AUTH", raising=False)
    assert credentials(None, no_auth=False, is_open=False) is None
    assert credentials(None, no_auth=True, is_open=True) is None
    assert credentials("ann:a:b", no_auth=False, is_open=True) == ("ann", "a:b")
    assert credentials(f"@{tmp_path}/secret", no_auth=False, is_open=True) == ("ann", "of a file")
    monkeypatch.setenv("PBE_AUTH", "ann:of the environment")
    assert credentials(None, no_auth=False, is_open=False) == ("ann", "of the environment")
    assert credentials(None, no_auth=True, is_open=True) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "other machines reach this --host: give --auth user:password, --auth @FILE"),
        (["--host", "example.org"], "other machines"),
        (["--auth", "secret"], "--auth is not user:password"),
        (["--auth", ":secret"], "--auth is not user:password"),
        (["--auth", "ann:"], "--auth is not user:password"),
        (["--auth", "@none"], "--auth @none: there is no such file"),
        (["--auth", "@/dev/zero"], "no such file"),
        (["--auth", "ann:secret", "--no-auth"], "--auth or --no-auth, not both"),
    ],
)
def test_wrong_passwords_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.delenv("PBE_AUTH", raising=False)
    assert main(["--ckpt", "none.ckpt", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "secret" not in error


@pytest.mark.parametrize(
    ("host", "loopback"), [("localhost", 1), ("127.0.0.9", 1), ("[::1]", 1), ("0.0.0.0", 0), ("::", 0)]
)
def test_which_hosts_are_this_machine_s(host, loopback):
    assert guard.is_loopback(host) == bool(loopback)


# --- what cannot be understood ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**26 + 1, 65 * 2**20, pytest.param(200 * 2**20, marks=pytest.mark.slow)])
def test_a_large_upload_is_refused_in_words(http, size):
    response = http.post(UPLOAD, files={"files": ("a.png", bytes(size))})
    assert response.status_code == 413
    assert re.search("64 MB|67108864", response.text)


def test_an_upload_of_unknown_length_is_refused(http):
    response = http.post(UPLOAD, content=iter([b"a"] * 9), headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (response.status_code, "Content-Length" in response.text) == (411, True)


WRONG = ["abc", [1], {"a": 1}, True, None, float("inf"), float("nan"), 10**400, -5]


def right_data(http: httpx.Client, files: dict[str, Path]) -> dict:
    """What `submit` sends, as JSON, by name, with the other arguments' defaults."""
    upload = {name: http.post(UPLOAD, files={"files": (path.name, path.read_bytes())}) for name, path in files.items()}
    given = {name: {"path": one.json()[0], "meta": {"_type": "gradio.FileData"}} for name, one in upload.items()}
    arguments = http.get("/gradio_api/info").json()["named_endpoints"]["/edit"]["parameters"]
    defaults = {one["parameter_name"]: one["parameter_default"] for one in arguments}
    return {**defaults, **given, **SETTINGS}


@pytest.mark.slow
def test_wrong_types_are_answered_in_words(http, files, capfd):
    right = right_data(http, files)
    assert set(right) > {"strength", "fit_mask", "window", "placement", "grow", "negative"}
    paths = (5, "/etc/passwd", "http://127.0.0.1:1/", "/", "\0")
    others = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
    for name, default in right.items():
        is_right = {"grow": [-5], "negative": [None]}.get(name, [True] if isinstance(default, bool) else [])
        for value in [*WRONG, *(others if name in (*files, "negative") else [])]:
            if value not in is_right:
                error = api_error(http, list({**right, name: value}.values()))
                assert re.search(rf"^{name} |^Value:? |/etc/passwd|null byte", error), (name, value, error)
                assert len(error) <= 600
    assert api_error(http, [])
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


def api_error(http: httpx.Client, data: list) -> str:
    body = json.dumps({"data": data})
    event = http.post("/gradio_api/call/edit", content=body, headers={"Content-Type": "application/json"}).json()
    answer = http.get(f"/gradio_api/call/edit/{event['event_id']}").text
    assert answer.startswith("event: error"), answer
    return json.loads(answer.partition("data: ")[2])["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("call/none", {"data": []}),
        ("call/v2/none", {"data": []}),
        ("call/v2/edit", {"frob": 1}),
        ("queue/join", {"data": [], "fn_index": 999, "session_hash": "a"}),
    ],
)
def test_requests_for_nothing_are_answered_in_words(http, path, body, capfd):
    response = http.post(f"/gradio_api/{path}", json=body)
    assert response.status_code == 400
    assert re.search("none|frob|999", response.json()["detail"])
    assert "Traceback" not in capfd.readouterr().err


# --- memory and room --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "side"), [("png", 8001), ("jpg", 8001), ("tif", 8001), ("webp", 6823), ("jp2", 7156)]
)
def test_every_picture_has_the_same_bound_before_it_is_decoded(tmp_path, suffix, side, monkeypatch):
    path = tmp_path / f"picture.{suffix}"
    quickly = {"method": 0} if suffix == "webp" else {}
    Image.new("L" if suffix != "webp" else "RGB", (side, side)).save(path, **quickly)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    for name in ("image", "mask", "exemplar"):
        with pytest.raises(ValueError, match=rf"{name} is {side}x{side}: .* megapixels"):
            uploads.take(path, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("name", ["image", "mask", "exemplar"])
def test_reading_a_picture_takes_no_more_than_that(tmp_path, mode, name):
    """Of 36 megapixels: a third more than the bytes that are counted would show."""
    picture = Image.new(mode, (6000, 6000))
    picture.paste((255,) * len(mode), (9, 9, 99, 99))
    picture.save(tmp_path / "picture.png")
    program = (
        "import resource, sys\n"
        "from pbe.images.reading import read_exemplar, read_mask, read_picture\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "mask = lambda path: read_mask(path, (6000, 6000))\n"
        "{'image': read_picture, 'mask': mask, 'exemplar': read_exemplar}[sys.argv[1]](sys.argv[2])\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    command = [sys.executable, "-c", program, name, str(tmp_path / "picture.png")]
    taken = int(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)
    assert taken < 1.33 * uploads.BYTES_PER_PIXEL["PNG"] * 6000**2


def test_the_oldest_files_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MAX_STORED", 5 * guard.MIN_STORED)
    for age, size in enumerate([1, 2 * guard.MIN_STORED, 1, 2 * guard.MIN_STORED]):  # the newest first
        path = tmp_path / str(age) / "file"
        path.parent.mkdir()
        path.write_bytes(bytes(size))
        os.utime(path, (1000 - age, 1000 - age))
    guard.make_room(tmp_path)
    assert sorted(path.parent.name for path in tmp_path.rglob("file")) == ["0", "1", "2"]


def test_each_request_makes_room(http, folder, monkeypatch):
    monkeypatch.setattr(guard, "MAX_STORED", 0)
    (path,) = http.post(UPLOAD, files={"files": ("a.png", b"a")}).json()
    assert Path(path).is_file()
    http.post(UPLOAD, files={"files": ("b.png", b"b")})
    assert not Path(path).exists()


# --- edits that nobody waits for --------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """Makes edits of 1000 steps of 0.05 s, and notes their seeds when they start and when they end."""
    started, ended = [], []

    def run_job(model, job, inputs, num_images, batch_size, callback, preview):
        started.append(job.settings.seed)
        try:
            for i in range(1000):
                time.sleep(0.05)
                callback(StepInfo(i, 1000, 0, None, None))
        finally:
            ended.append(job.settings.seed)
        return [inputs.picture.source]

    monkeypatch.setattr(uploads, "run_job", at_once(run_job))
    return started, ended


def wait_for(condition, seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_cancelled_edit_stops_at_the_next_step(address, files, slow, capfd):
    started, ended = slow
    client = Client(address, verbose=False)
    job = submit(client, files, seed=1)
    wait_for(lambda: started == [1])
    job.cancel()
    wait_for(lambda: ended == [1], 3)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_waiting_edit_that_is_cancelled_never_starts(address, files, slow):
    started, ended = slow
    client = Client(address, verbose=False)
    jobs = [submit(Client(address, verbose=False), files, seed=1)]
    wait_for(lambda: started == [1])
    jobs += [submit(client, files, seed=2)]
    time.sleep(1)
    jobs[1].cancel()
    jobs[0].cancel()
    wait_for(lambda: len(ended) == 1)
    time.sleep(0.5)
    assert started == [1]


def test_edits_of_a_client_that_left_stop_and_do_not_start(address, files, slow):
    started, ended = slow
    program = (
        "import sys\n"
        "from gradio_client import Client, handle_file\n"
        "client = Client(sys.argv[1], verbose=False)\n"
        "files = dict(zip(('image', 'mask', 'exemplar'), map(handle_file, sys.argv[2:])))\n"
        "jobs = [client.submit(**files, seed=seed, steps=4, api_name='/edit') for seed in (1, 2, 3)]\n"
        "[job.result() for job in jobs]\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, address, *map(str, files.values())]) as left:
        wait_for(lambda: len(started) == 1, 60)
        time.sleep(1)
        left.kill()
    wait_for(lambda: len(ended) == 1, 3)
    last = submit(Client(address, verbose=False), files, seed=9)
    wait_for(lambda: len(started) == 2, 5)
    assert started[1] == 9
    last.cancel()
    wait_for(lambda: len(ended) == 2)


def test_an_edit_whose_client_never_listened_stops(http, files, slow, monkeypatch):
    monkeypatch.setattr(serving, "UNREAD", 1)
    started, ended = slow
    http.post("/gradio_api/call/edit", json={"data": list(right_data(http, files).values())})
    wait_for(lambda: len(started) == len(ended) == 1)


@pytest.mark.slow
def test_one_edit_at_a_time_also_after_a_cancel(address, files, monkeypatch):
    """Gradio takes the next edit while the cancelled one's step still runs."""
    running, most = threading.Semaphore(1), []

    def run_job(model, job, inputs, num_images, batch_size, callback, preview):
        most.append(running.acquire(blocking=False))
        try:
            for i in range(3):
                time.sleep(1)
                callback(StepInfo(i, 3, 0, None, None))
        finally:
            running.release()
        return [inputs.picture.source]

    monkeypatch.setattr(uploads, "run_job", at_once(run_job))
    first = submit(Client(address, verbose=False), files)
    wait_for(lambda: len(most) == 1)
    second = submit(Client(address, verbose=False), files)
    time.sleep(0.5)
    first.cancel()
    assert len(second.result(timeout=30)) == 1
    assert most == [True, True]


# --- the end ----------------------------------------------------------------------------------------------


# The command, which says which hosts it looks up; background jobs of a shell ignore Ctrl+C.
COMMAND = """
import signal, socket, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
look_up = socket.getaddrinfo
def said(host, *args, **kwargs):
    print("asks", host, flush=True)
    return look_up(host, *args, **kwargs)
socket.getaddrinfo = said
from pbe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(checkpoint: Path, temporary: Path) -> tuple[subprocess.Popen, str, str]:
    """A page in a process of its own, what it has printed, and its address."""
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    del environment["GRADIO_ANALYTICS_ENABLED"]  # the page asks for no telemetry by itself
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            COMMAND,
            "app",
            "--ckpt",
            str(checkpoint),
            "--device",
            "cpu",
            "--port",
            str(free_port()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    printed = ""
    while not (found := re.search(r"^serving at (\S+)", printed, re.MULTILINE)):
        line = process.stdout.readline()
        assert line, printed
        printed += line
    return process, printed, found[1]


SIGNALS = [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGHUP))]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_page_cleans_up_before_and_behind_itself_and_asks_no_other_machine(tiny_checkpoint, files, tmp_path, number):
    """One process, since its start takes seconds: it removes what dead pages left, and at a signal, which also ends
    its edits, its own files."""
    temporary, host = tmp_path / "temporary", socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = temporary / f"pbe-page-{host}-{dead.pid}-a"
    (left / "files").mkdir(parents=True)
    (left / "files" / "image-7.png").write_bytes(b"an edit")
    kept = [f"pbe-page-{host}-{os.getpid()}-alive", f"pbe-page-{host}-x", "pbe-page-elsewhere-999999999-a", "other-9-a"]
    for name in kept:
        (temporary / name).mkdir()
    server, printed, address = start(tiny_checkpoint, temporary)
    try:
        assert not left.exists()
        client = Client(address, verbose=False)
        submit(client, files, steps=4).result(timeout=60)
        assert list(temporary.rglob("image-7.png"))
        job = submit(client, files, steps=200, num_images=8)
        wait_for(lambda: job.status().progress_data)
        server.send_signal(number)
        server.send_signal(number)  # as `timeout` does
        printed += server.communicate(timeout=30)[0]
    finally:
        server.kill()
    assert server.returncode == 0, printed
    assert "Traceback" not in printed
    assert not [path for path in temporary.rglob("*") if path.is_file()]
    assert {path.name for path in temporary.iterdir()} - {"gradio"} == set(kept)  # Gradio's own folder is empty
    assert {"127.0.0.1"} <= set(re.findall(r"^asks (\S+)", printed, re.MULTILINE)) <= {"127.0.0.1", "localhost"}


def test_a_signal_interrupts_once():
    seen = []
    with handling(interrupt, signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    with handling(lambda number, _: seen.append(number), signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with handling(interrupt, signal.SIGHUP):  # ignored, as by nohup: it stays so
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.slow
def test_the_memory_stays_over_200_edits(tiny_checkpoint, files, tmp_path):
    """Of what edit 20 has, in MB; a leak of one picture or network per edit would be more."""
    (tmp_path / "temporary").mkdir()
    server, _, address = start(tiny_checkpoint, tmp_path / "temporary")
    taken = {}
    try:
        client = Client(address, verbose=False)
        for edit in range(1, 201):
            submit(client, files, seed=edit).result(timeout=60)
            if edit in (20, 100, 200):
                taken[edit] = psutil.Process(server.pid).memory_info().rss / 2**20
    finally:
        server.kill()
    print(taken)
    assert taken[200] - taken[20] < 100
