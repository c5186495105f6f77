"""The sources of training pictures by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from pbe.data.coco import Coco
from pbe.data.cocoee import CocoEE
from pbe.data.manifest import Manifest
from pbe.data.open_images import OpenImages
from pbe.data.records import Source
from pbe.io.fields import Range, check_fields
from pbe.io.suggest import did_you_mean


@dataclass
class SourceConfig:
    """Where pictures come from."""

    kind: Literal["open_images", "coco", "manifest", "cocoee"] = "manifest"
    """What `path` is; one of KINDS."""
    path: str = ""
    """What lists the pictures: an index of OpenImages, a COCO json, a manifest, or COCOEE's folder."""
    images: str = ""
    """The pictures' folder; a manifest may find its own."""
    exclude: list[str] = field(default_factory=list)
    """Names of OpenImages' flags, such as IsGroupOf or IsDepiction, whose boxes are left out."""


@dataclass
class MixedSourceConfig(SourceConfig):
    """One of several sources of training pictures."""

    weight: Annotated[float, Range(0, above=True)] = 1.0
    """Its share of the examples, against the weights of the others."""
    noisy: Annotated[float, Range(0, 1)] = 0.0
    """Probability that an example of it is trained on at the noisier half of the timesteps alone: for pictures that
    show form and pose but no detail, such as frames of a video (AnyDoor, arXiv 2307.09481, section 3.3)."""

    def __post_init__(self) -> None:
        check_fields(self, "data.sources")


Area = tuple[float, float]


class Kind(NamedTuple):
    """How a kind of source is opened, and the fields of its config."""

    open: Callable[[SourceConfig, Area], Source]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "open_images": Kind(
        lambda c, area: OpenImages(c.path, c.images, c.exclude, area), ("path", "images"), ("exclude",)
    ),
    "coco": Kind(lambda c, area: Coco(c.path, c.images, area), ("path", "images")),
    "manifest": Kind(lambda c, area: Manifest(c.path, c.images, area), ("path",), ("images",)),
    # A test set fixes its boxes: all of them count, whatever the training run's limits.
    "cocoee": Kind(lambda c, area: CocoEE(c.path), ("path",)),
}


def open_source(config: SourceConfig, area: Area = (0.0, 1.0)) -> Source:
    """The source that `config` describes, of the boxes whose share of the picture is within `area`.

    Pictures without such a box are left out, where that is known without opening them. ValueError or FileNotFoundError
    naming what is wrong with the config or with the files.
    """
    if config.kind not in KINDS:
        raise ValueError(f"unknown source kind {config.kind!r}{did_you_mean(config.kind, KINDS)}")
    kind = KINDS[config.kind]
    for name in ("path", "images", "exclude"):
        given = bool(getattr(config, name))
        if name in kind.required and not given:
            raise ValueError(f"a source of kind {config.kind} needs {name}")
        if given and name not in (*kind.required, *kind.optional):
            raise ValueError(f"a source of kind {config.kind} has no {name}, got {getattr(config, name)!r}")
    return kind.open(config, area)
