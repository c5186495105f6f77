"""The time that a run may take: what does not fit is left out, and said; and the lines that say how far it is."""

import math
import sys
import time
from collections.abc import Iterator


def say(line: str) -> None:
    """A line of progress on stderr, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


class Budget:
    """A run's minutes, None for any number; `left_out` says in words what they were not enough for."""

    def __init__(self, minutes: float | None = None):
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def fits(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for `what`, which takes about `seconds`; it is noted if there is not."""
        left = self.left
        if left > seconds:
            return True
        needed = f"about {seconds:.3g} s are needed, " if seconds else ""
        self.left_out.append(f"{what}: {needed}{max(left, 0):.0f} s are left")
        say(f"left out: {self.left_out[-1]}")
        return False

    def rounds(self, number: int, what: str, seconds: float = 0.0) -> Iterator[int]:
        """0, 1, … up to `number` rounds of `what`: those that fit, each expected to take as long as the last, the first
        `seconds`."""
        for i in range(number):
            if not self.fits(f"{what}, {number - i} of {number} rounds", seconds):
                return
            start = time.monotonic()
            yield i
            seconds = time.monotonic() - start
