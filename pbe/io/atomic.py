"""Writing files so that a crash leaves no half file, and two processes do not write the same ones."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside `path` to write a file or folder to, which becomes `path` once all is written.

    Raises `FileExistsError` for a `path` that exists, unless `overwrite` is set; whatever fails, it is kept.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --force (overwrite=True) replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{suffix}") for suffix in ("part", "old"))
    part.touch()
    mode = part.stat().st_mode  # as the umask has it; some libraries make private files
    part.unlink()
    try:
        yield part
        for file in [part] if part.is_file() else filter(Path.is_file, part.rglob("*")):
            file.chmod(mode)
        if path.is_dir() and not part.is_dir():
            raise IsADirectoryError(f"{path} is a folder; a file does not replace it")
        if path.is_dir():  # a folder cannot be replaced in one step
            os.replace(path, old)
        os.replace(part, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (part, old):
            if left.is_dir():
                shutil.rmtree(left)
            left.unlink(missing_ok=True)


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
        yield
