"""How much is measured, and how the pictures are made: the flags of the command, with their defaults."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pbe.editing.settings import DEMO, SamplerName
from pbe.io.fields import Range, check, field_docs, field_types, read

Count = Annotated[int, Range(1)]
AtLeastTwo = Annotated[int, Range(2)]


@dataclass(frozen=True)
class Settings:
    """What `measure` does; ValueError for what cannot be measured."""

    side: Annotated[int, Range(32)] = 64
    """Pixels of the windows and crops that are judged, whatever the model's own are."""
    cases: AtLeastTwo = 128
    """Photos of the retrieval, seam, guidance and copy figures."""
    exemplars: Literal["any", "kind"] = "any"
    """Exemplars of any other photo, or of one of the photo's own kind, as in COCOEE."""
    gallery: AtLeastTwo = 16
    """Exemplars that retrieval chooses among."""
    guidance: float = DEMO.guidance
    """Of the results."""
    guidance_values: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0)
    """Of the guidance figure."""
    steps: Count = DEMO.steps
    """Sampling steps, on the trailing timesteps, or on those that the sampler needs."""
    sampler: SamplerName = DEMO.sampler
    """The sampling method."""
    seed_cases: AtLeastTwo = 24
    """Photos of the seeds figure."""
    seeds: AtLeastTwo = 4
    """Seeds, and exemplars, of each of those."""
    sampler_cases: AtLeastTwo = 8
    """Photos of the samplers figure."""
    sampler_steps: tuple[Count, ...] = (10, 15, 20, 25, 50)
    """Numbers of steps of the samplers figure."""
    reference_steps: Count = 500
    """Steps of DDIM that the samplers are compared with."""
    seed: int = 0
    """Of the first result, and of the choice of exemplars."""
    batch_size: Count = 32
    """Pictures sampled at once."""
    classifier_epochs: Count = 10
    """Of the classifier's training."""

    def __post_init__(self) -> None:
        for name, annotation in FIELDS.items():
            check(option(name), getattr(self, name), annotation)
        for name in ("gallery", "seed_cases", "sampler_cases"):
            if (value := getattr(self, name)) > self.cases:
                raise ValueError(f"{option(name)} must be 2 to the number of cases, {self.cases}; got {value}")
        if self.seeds >= self.seed_cases:
            raise ValueError(f"--seeds must be at least 2 and below --seed-cases {self.seed_cases}; got {self.seeds}")
        if len(set(self.guidance_values)) < 2:
            raise ValueError(f"--guidance-values needs two different values, got {list(self.guidance_values)}")


FIELDS = field_types(Settings)


def option(name: str) -> str:
    """A field as a flag."""
    return f"--{name.replace('_', '-')}"


def add_flags(p: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """The flags of some fields; `settings_of` reads them."""
    docs = field_docs(Settings)
    for f in fields(Settings):
        if f.name in names:
            many = isinstance(f.default, tuple)
            shown = str(f.default).strip("()").replace(",", "")
            p.add_argument(option(f.name), nargs="+" if many else 1, help=f"{docs[f.name]} (default: {shown})")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of the flags that were given; ValueError as the class."""
    given = {name: getattr(args, name, None) for name in FIELDS}
    return Settings(**{n: read(option(n), " ".join(value), FIELDS[n]) for n, value in given.items() if value})
