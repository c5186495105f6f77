"""How much is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pbe.editing.settings import DEMO

Exemplars = Literal["any", "kind"]


@dataclass(frozen=True)
class Settings:
    """How much is measured, and how the pictures are made.

    cases: photos of the retrieval, seam, guidance and copy figures. exemplars: of "any" other photo, or of one of the
    photo's own "kind", as COCOEE's are. gallery: exemplars that retrieval chooses among.
    guidance: of the results; scales: of the guidance figure. seed_cases photos with `seeds` seeds and as many
    exemplars; sampler_cases photos for the samplers, with sampler_steps against DDIM with reference_steps.
    """

    cases: int = 128
    exemplars: Exemplars = "any"
    gallery: int = 16
    guidance: float = DEMO.guidance
    scales: Sequence[float] = (1.0, 2.0, 3.0, 5.0)
    steps: int = DEMO.steps
    sampler: str = DEMO.sampler
    seed_cases: int = 24
    seeds: int = 4
    sampler_cases: int = 8
    sampler_steps: Sequence[int] = (10, 15, 20, 25, 50)
    reference_steps: int = 1000
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.exemplars not in get_args(Exemplars):
            raise ValueError(f"--exemplars must be one of {', '.join(get_args(Exemplars))}, got {self.exemplars!r}")
        if not 2 <= self.gallery <= self.cases:
            raise ValueError(f"--gallery must be 2 to the number of cases, {self.cases}; got {self.gallery}")
        for name in ("seed_cases", "sampler_cases"):
            if not 2 <= getattr(self, name) <= self.cases:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} must be 2 to the number of cases, {self.cases}; got {getattr(self, name)}"
                )
        if not 2 <= self.seeds < self.seed_cases:
            raise ValueError(f"--seeds must be at least 2 and below --seed-cases {self.seed_cases}; got {self.seeds}")
        if len(set(self.scales)) < 2:
            raise ValueError(f"--scales needs two different values, got {list(self.scales)}")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
