"""What becomes of edits where a server is stopped or killed, and where the next one begins."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from fakes import sent

from pbe.cli.serve import main
from pbe.serve.limits import Limits

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
ASYNC = {"Prefer": "respond-async"}
SLOW = {"steps": "1000", "sampler": "ddim"}


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def begin(client, pictures, **texts) -> str:
    return client.post("/v1/edits", files=sent(pictures), data=texts, headers=ASYNC).headers["location"]


def status(client, job: str) -> str:
    return client.get(job).json()["status"]


def start(checkpoint: Path, folder: Path) -> tuple[subprocess.Popen, str]:
    """The command in a process of its own, and its address."""
    program = "import sys; from pbe.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = [str(checkpoint), "--device", "cpu", "--port", "0", "--files", str(folder)]
    command = [sys.executable, "-c", program, "serve", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PBE_TOKEN"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )
    line = process.stdout.readline()
    assert line.startswith("serving at "), line
    return process, re.search(r"http://\S+", line)[0]


@pytest.mark.slow
def test_jobs_of_a_killed_server_are_found_again(tiny_checkpoint, serve, pictures, tmp_path, capsys):
    process, address = start(tiny_checkpoint, tmp_path)
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            done = begin(client, pictures, steps=1)
            wait_for(lambda: status(client, done) == "done")
            running, waiting = begin(client, pictures, **SLOW), begin(client, pictures, steps=2)
            wait_for(lambda: status(client, running) == "running")
            assert main([str(tiny_checkpoint), "--files", str(tmp_path), "--port", "0"]) == 2
            assert f"another server has its jobs in {tmp_path}" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    for name in ("a" * 32, "mine"):  # as one whose files were still being sent, and another's
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.png").write_bytes(b"a")
    with serve(tmp_path) as client:
        assert not (tmp_path / ("a" * 32)).exists()
        assert (tmp_path / "mine" / "image.png").exists()
        assert status(client, done) == "done"
        assert client.get(f"{done}/results/0").status_code == 200
        wait_for(lambda: status(client, running) == "running")
        assert status(client, waiting) == "queued"
        client.delete(running)
        wait_for(lambda: status(client, waiting) == "done")


@pytest.mark.slow
def test_a_stopped_server_finishes_what_runs_and_hands_back_what_waits(serve, pictures, tmp_path):
    answers = {}

    def ask(client, name: str, **texts) -> threading.Thread:
        def post() -> None:
            answers[name] = httpx.post(f"{client.base_url}/v1/edits", files=sent(pictures), data=texts, timeout=60)

        thread = threading.Thread(target=post)
        thread.start()
        return thread

    with serve(tmp_path) as client:
        threads = [ask(client, "running", steps=150)]
        wait_for(lambda: client.api.engine.running)
        job = begin(client, pictures, steps=2)
        threads.append(ask(client, "waiting", steps=3))
        wait_for(lambda: len(client.api.engine.waiting) == 2)
    for thread in threads:
        thread.join()
    assert answers["running"].status_code == 200
    assert (answers["waiting"].status_code, answers["waiting"].headers["retry-after"]) == (503, "5")
    assert answers["waiting"].json()["error"]["code"] == "shutting_down"
    assert [path.name for path in tmp_path.iterdir()] == [job.rpartition("/")[2]]
    with serve(tmp_path) as client:
        wait_for(lambda: status(client, job) == "done")


@pytest.mark.slow
def test_what_runs_too_long_at_the_end_is_handed_back_too(serve, pictures, tmp_path):
    with serve(tmp_path, limits=Limits(grace=1)) as client:
        job = begin(client, pictures, **SLOW)
        wait_for(lambda: status(client, job) == "running")
    with serve(tmp_path) as client:
        wait_for(lambda: status(client, job) == "running")
        client.delete(job)


@pytest.mark.slow
def test_the_command_ends_at_sigterm(tiny_checkpoint, pictures, tmp_path):
    process, address = start(tiny_checkpoint, tmp_path)
    answer = httpx.post(f"{address}/v1/edits", files=sent(pictures), data={"steps": 2}, timeout=60)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert (answer.status_code, process.returncode, printed) == (200, 0, "")


@pytest.mark.slow
def test_memory_is_flat(tiny_checkpoint, pictures, tmp_path):
    """Over 150 edits, a quarter of them wrong, after 60 that fill what is kept."""
    import psutil

    process, address = start(tiny_checkpoint, tmp_path)
    with httpx.Client(base_url=address, timeout=60) as client:

        def edit(count: int) -> int:
            for i in range(count):
                texts = {"steps": "1", "seed": str(i), **({"window": "0,0,1,1"} if i % 4 == 0 else {})}
                answer = client.post("/v1/edits", files=sent(pictures), data=texts)
                assert answer.status_code == (400 if i % 4 == 0 else 200)
            return psutil.Process(process.pid).memory_info().rss

        before = edit(60)
        assert edit(150) - before < 20 * 2**20
    process.kill()
    process.wait()
