"""What `replacing` promises where processes are killed, disks are full and file systems are odd."""

import errno
import io
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.checkpoint import main
from pbe.io import atomic
from pbe.io.atomic import locked, replacing


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def write(path: Path, text: str, overwrite: bool = False) -> None:
    with replacing(path, overwrite) as part:
        part.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_killed_processes_left_is_removed(tmp_path):
    dead = dead_process()
    (tmp_path / f".x.ckpt.{dead}.part").write_text("half")
    (tmp_path / f".x.ckpt.{os.getpid()}.part").mkdir()  # a container gives the same number again
    (tmp_path / f".x.ckpt.{os.getpid()}.part" / "half").write_text("half")
    kept = [
        f".x.ckpt.{os.getppid()}.part",  # of a process that runs
        f".y.ckpt.{dead}.part",  # beside another target
        f".x.ckpt.{dead}.partial",
        ".x.ckpt.part",
        f"x.ckpt.{dead}.part",
    ]
    for name in kept:
        (tmp_path / name).write_text("not ours")
    write(tmp_path / "x.ckpt", "whole")
    assert names(tmp_path) == sorted(["x.ckpt", *kept])


def test_a_killed_writer_leaves_nothing_to_the_next_run(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from pbe.io.atomic import replacing
with replacing(Path(sys.argv[1]), False) as part:
    part.mkdir()
    (part / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "folder"]).returncode == -9
    assert len(names(tmp_path)) == 1
    write(tmp_path / "folder", "whole")
    assert names(tmp_path) == ["folder"]


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path):
    old = tmp_path / f".folder.{dead_process()}.old"
    old.mkdir()
    (old / "content").write_text("before")
    with pytest.raises(FileExistsError):
        write(tmp_path / "folder", "after")
    assert (tmp_path / "folder" / "content").read_text() == "before"
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("name", ["x" * 250 + ".ckpt", "é" * 120 + ".safetensors", os.fsdecode(b"\xff\xfe.ckpt")])
def test_names_of_any_length_and_bytes(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    save_checkpoint({"w": torch.ones(2)}, tmp_path / name, {})
    save_checkpoint({"w": torch.ones(3)}, tmp_path / name, {}, overwrite=True)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_names_the_file(tmp_path, number):
    (tmp_path / "x.txt").write_text("before")

    def fill() -> None:
        with replacing(tmp_path / "x.txt", True) as part:
            part.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=r"x\.txt'$") as caught:
        fill()
    assert caught.value.errno == number
    assert (tmp_path / "x.txt").read_text() == "before"
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed", "--out", "{}.ckpt"],
        pytest.param(["slim", "demo", "--out", "{}.ckpt"], marks=pytest.mark.slow),
        pytest.param(["slim", "demo", "--out", "{}.safetensors"], marks=pytest.mark.slow),
        pytest.param(["convert", "demo", "--out", "{}"], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, arguments):
    """With a limit on the size of files in the place of a full disk: the system's calls fail in the same way."""
    out = tmp_path / "result"
    pytest.importorskip("safetensors")
    arguments = [argument.format(out) for argument in arguments]
    code = "import sys; from pbe.cli.checkpoint import main; sys.exit(main(sys.argv[1:]))"
    limit = 1 << 18
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line == f"error: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{arguments[-1]}'"
    assert names(tmp_path) == []


class FullDisk(io.FileIO):
    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_torchs_own_writer(tmp_path, monkeypatch, capsys):
    """The system's error is lost in torch's, which tells of positions."""
    monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk(self, mode))
    assert main(["seed", "--out", str(tmp_path / "x.ckpt")]) == 2
    assert capsys.readouterr().err == f"error: [Errno 28] No space left on device: '{tmp_path / 'x.ckpt'}'\n"
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_not_a_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "x.ckpt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/null")
    with pytest.raises(OSError, match=r"x\.ckpt is a pipe, a socket or a device"):
        write(path, "text", overwrite=True)
    assert names(tmp_path) == ["x.ckpt"]


def test_file_systems_without_permissions(tmp_path, monkeypatch):
    def chmod(self: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "chmod", chmod)
    atomic.warn_once.cache_clear()
    pytest.importorskip("safetensors")
    with warnings.catch_warnings(record=True) as caught:
        for name in ("a.ckpt", "b.safetensors", "c.safetensors"):
            warnings.simplefilter("always")
            save_checkpoint({"w": torch.ones(2)}, tmp_path / name, {})
    assert names(tmp_path) == ["a.ckpt", "b.safetensors", "c.safetensors"]
    (warning,) = caught
    assert "chmod" in str(warning.message)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    def lockf(file: object, command: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    atomic.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"\.lock cannot be locked"), locked(tmp_path / ".lock", "another"):
        pass


def test_a_lock_that_is_held(tmp_path):
    code = f"""
from pathlib import Path
from pbe.io.atomic import locked
with locked(Path({str(tmp_path / ".lock")!r}), "another process writes"):
    pass
"""
    with locked(tmp_path / ".lock", "another process writes"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError: another process writes" in done.stderr
