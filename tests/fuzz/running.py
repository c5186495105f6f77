"""Checking changed inputs for a time, each within the rule: 10 seconds of the processor and 1 GB."""

import argparse
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS, MEMORY = 10.0, 1 << 30  # bytes beyond what the process has taken before


@contextmanager
def bounded() -> Iterator[None]:
    """AssertionError where a block takes more than the rule allows."""
    start, before = time.process_time(), peak_memory()
    yield
    seconds, taken = time.process_time() - start, peak_memory() - before
    assert seconds < SECONDS, f"it took {seconds:.1f} s"
    assert taken < MEMORY, f"it took {taken / 1e9:.1f} GB"


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fuzz(inputs: st.SearchStrategy, check: Callable[[object, Path], object], seconds: float, folder: Path) -> int:
    """Checks inputs for a time; returns how many. Raises what broke the rule."""
    end, count = time.monotonic() + seconds, 0

    @settings(max_examples=50, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(value=inputs)
    def run(value: object) -> None:
        nonlocal count
        if time.monotonic() < end:
            count += 1
            with warnings.catch_warnings(), bounded():
                warnings.simplefilter("ignore")
                check(value, folder)

    while time.monotonic() < end:
        run()
    return count


def main(doc: str, inputs: st.SearchStrategy, check: Callable[[object, Path], object]) -> int:
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        print(f"{fuzz(inputs, check, parser.parse_args().seconds, folder):,} inputs, none of which broke the rule")
    except BaseException:
        print(f"the input is in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    return 0


def changed(draw: st.DrawFn, data: bytes, pieces: list[bytes]) -> bytes:
    """Up to five spans replaced by other bytes, by pieces, by repetitions of themselves, or by nothing."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(result)))
        span = result[start : start + draw(st.integers(0, 12))]
        new = st.one_of(
            st.binary(max_size=8),
            st.just(bytes(span) * draw(st.sampled_from([0, 2, 50]))),
            st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map(b"".join),
        )
        result[start : start + len(span)] = draw(new)
    return bytes(result)
