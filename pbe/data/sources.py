"""The sources of training pictures by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pbe.data.coco import Coco
from pbe.data.cocoee import CocoEE
from pbe.data.manifest import Manifest
from pbe.data.open_images import OpenImages
from pbe.data.records import Source


@dataclass
class SourceConfig:
    """Where pictures come from.

    path: what lists them: an index of OpenImages, a COCO json, a manifest, or COCOEE's folder.
    images: the pictures' folder; a manifest may find its own, and COCOEE's is its path.
    exclude: names of OpenImages' flags, such as IsGroupOf or IsDepiction, whose boxes are left out.
    """

    kind: Literal["open_images", "coco", "manifest", "cocoee"] = "manifest"
    path: str = ""
    images: str = ""
    exclude: list[str] = field(default_factory=list)


Area = tuple[float, float]


def _open_images(config: SourceConfig, area: Area) -> Source:
    return OpenImages(config.path, _needed(config, "images"), config.exclude, area)


def _coco(config: SourceConfig, area: Area) -> Source:
    return Coco(config.path, _needed(config, "images"), area)


def _manifest(config: SourceConfig, area: Area) -> Source:
    return Manifest(config.path, config.images, area)


def _cocoee(config: SourceConfig, area: Area) -> Source:
    # The benchmark fixes its boxes: all of them count, whatever the training run's limits.
    return CocoEE(config.path)


SOURCES: dict[str, Callable[[SourceConfig, Area], Source]] = {
    "open_images": _open_images,
    "coco": _coco,
    "manifest": _manifest,
    "cocoee": _cocoee,
}


def open_source(config: SourceConfig, area: Area = (0.0, 1.0)) -> Source:
    """The source that `config` describes, of the boxes whose share of the picture is within `area`.

    Pictures without such a box are no part of it, where that is known without opening them. ValueError or
    FileNotFoundError naming what is wrong with the config or with the files.
    """
    if config.kind not in SOURCES:
        raise ValueError(f"kind {config.kind!r} is no source; choose from {', '.join(SOURCES)}")
    _needed(config, "path")
    for name, kinds in (("images", ("open_images", "coco", "manifest")), ("exclude", ("open_images",))):
        if getattr(config, name) and config.kind not in kinds:
            raise ValueError(f"{name} is for {', '.join(kinds)}; a source of kind {config.kind} has none")
    return SOURCES[config.kind](config, area)


def _needed(config: SourceConfig, name: str) -> str:
    value = getattr(config, name)
    if not value:
        raise ValueError(f"a source of kind {config.kind} needs {name}")
    return value
