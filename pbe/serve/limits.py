"""What a server takes: its flags are derived from here."""

from dataclasses import dataclass
from typing import Annotated

from pbe.io.fields import Range

COUNT = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Limits:
    """The limits of a server."""

    max_waiting: COUNT = 64
    """Edits in the queue; for more the answer is 429."""
    max_batch: COUNT = 4
    """Results that are sampled together where edits of equal settings wait."""
    max_seconds: COUNT = 600
    """Seconds that one edit may take."""
    max_body: COUNT = 64
    """Megabytes of a request."""
    max_files: COUNT = 4096
    """Megabytes of all jobs' files, above which the oldest jobs that are over are removed."""
    grace: COUNT = 30
    """Seconds for what runs when the server is stopped."""
