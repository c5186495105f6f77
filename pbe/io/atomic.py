"""Writing files so that a crash leaves no half file, and two processes do not write the same ones."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

MAX_NAME_BYTES = 255  # of a file, on nearly all file systems
MAX_LISTED = 2_000  # names in a folder
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_large_folders: set[Path] = set()


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside `path` to write a file or folder to, which becomes `path` once all is written.

    Raises `FileExistsError` for a `path` that exists, unless `overwrite` is set; whatever fails, it is kept. `OSError`
    that names `path` where the disk is full. What killed processes left of the same file is removed.
    """
    stem = f".{path.name}"
    if len(os.fsencode(stem)) > MAX_NAME_BYTES - 20:  # no room for a process and a suffix
        stem = f".{hashlib.sha256(os.fsencode(stem)).hexdigest()[:32]}"
    part, old = (path.with_name(f"{stem}.{os.getpid()}.{suffix}") for suffix in ("part", "old"))
    sweep(path, stem)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --force (overwrite=True) replaces it")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path} is a pipe, a socket or a device; it is not replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if path.is_dir() and part.is_dir():  # a folder cannot be replaced in one step
            os.replace(path, old)
        os.replace(part, path)
    except Exception as error:
        number = write_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (part, old):
            remove(left)


def sweep(path: Path, stem: str) -> None:
    """Removes what killed processes left beside `path`; where one was replacing a folder, the old one comes back.

    A large folder is listed once: at every picture of a long batch it would take too long.
    """
    if path.parent in _large_folders or not path.parent.is_dir():
        return
    names = os.listdir(path.parent)
    if len(names) > MAX_LISTED:
        _large_folders.add(path.parent)
    for name in names:
        found = re.fullmatch(re.escape(stem) + r"\.([1-9]\d{0,8})\.(part|old)", name)
        if not found or (int(found[1]) != os.getpid() and is_running(int(found[1]))):
            continue
        left = path.with_name(name)
        if found[2] == "old" and not path.exists():
            os.replace(left, path)
        remove(left)


def is_running(process: int) -> bool:
    """Whether this host has a process of this number."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # another user's process cannot be sent a signal
    return True


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@cache
def warn_once(message: str) -> None:
    """Warns once in this process, whatever the filters are."""
    warnings.warn(message, stacklevel=3)


def write_error(error: BaseException | None) -> int | None:
    """The system's number for a disk that is full, if that is why writing failed.

    torch's and safetensors' own errors come after the system's, or quote its number.
    """
    while error is not None:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
        if number in WRITE_ERRORS:
            return number
        error = error.__cause__ or error.__context__
    return None


def write_text(path: Path, text: str) -> None:
    """Writes a text file, in place of one that is there."""
    with replacing(path, overwrite=True) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path, holder: str) -> Iterator[None]:
    """Keeps other processes that ask for the same lock out, for as long as this one lives or the block lasts.

    Raises `BlockingIOError` that says `holder` where another process has it.
    """
    with path.open("a") as file:
        try:
            # lockf and not flock: data workers would inherit the latter, and keep it where a run was killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BlockingIOError(f"{holder} ({path})") from None
        except OSError as error:  # NFS mounted nolock, Lustre without flock
            warn_once(f"{path} cannot be locked ({error.strerror}): start one process at a time")
        yield
