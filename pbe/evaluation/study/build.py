"""A user study as one page: people rank several systems' results by quality and by likeness to the exemplar.

As in the study of the paper (arXiv 2211.13227), the results of an item stand side by side in random order and are
ranked twice. The page works from the disk and sends nothing; `pbe.evaluation.study.report` reads what it saves.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from pbe import __version__
from pbe.evaluation.cocoee import read_rgb
from pbe.evaluation.html import embedded, jpeg_uri
from pbe.evaluation.test_set import TestSet, read_result, result_files
from pbe.io.atomic import replacing, write_text

KEY, PAGE = "key.json", "page/study.html"  # in the study's folder; participants get the folder of the page alone
MAX_SYSTEMS = 9  # more cannot be told apart at once, and the page names ranks up to the 9th
MAX_INLINE = 64 * 2**20  # bytes of pictures inside the page


@dataclass(frozen=True)
class StudyConfig:
    """What a study shows: `num_items` of the test set, drawn by the seed (all, if it has fewer).

    size: of the longer side of the pictures, in pixels; larger ones are reduced. quality: of the JPEGs, 1 to 95.
    title: heads the page. send_to: ends the sentence "Save your answers and …".
    """

    num_items: int = 30
    size: int = 512
    quality: int = 90
    seed: int = 0
    title: str = "Picture study"
    send_to: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (("num_items", 1, 10_000), ("size", 64, 4096), ("quality", 1, 95)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} to {high}, got {getattr(self, name)}")


def build_study(
    test_set: TestSet,
    systems: Mapping[str, str | Path],
    out: str | Path,
    config: StudyConfig = StudyConfig(),
    as_files: bool = False,
    overwrite: bool = False,
    on_item: Callable[[], None] | None = None,
) -> str:
    """Writes `page/study.html` and `key.json` into a folder, and returns the study's id, which its content determines.

    `systems` are folders of results by name, as `result_files` reads them. Neither page nor pictures hold the names:
    the key alone tells which picture is whose, so hand out the folder `page` without it. `as_files` puts the pictures
    beside the page instead of inside it.

    ValueError for fewer than 2 or more than 9 systems, a result of another size than its image, or more pictures
    than a page can hold; FileNotFoundError for missing results; FileExistsError for an existing folder unless
    `overwrite`.
    """
    out = Path(out)
    if not 2 <= len(systems) <= MAX_SYSTEMS:
        raise ValueError(f"a study ranks 2 to {MAX_SYSTEMS} systems, got {len(systems)}: {', '.join(systems)}")
    unprintable = [name for name in systems if not name.strip() or not name.isprintable()]
    if unprintable:
        raise ValueError(f"a system's name must be printable text, got {unprintable[0]!r}")
    if out.exists() and not (overwrite and (out / KEY).is_file()):
        raise FileExistsError(f"{out} exists; --force (overwrite=True) replaces it, if it is a study")
    items, key, pictures = _draw_items(test_set, systems, config, on_item)
    total = sum(map(len, pictures.values()))
    if total > MAX_INLINE and not as_files:
        raise ValueError(
            f"the pictures take {total / 2**20:.0f} MiB, more than the {MAX_INLINE // 2**20} MiB that fit in one page; "
            "--files (as_files=True) puts them beside it, a smaller size, quality or number of items makes them fewer"
        )

    digests = {name: hashlib.sha256(data).hexdigest() for name, data in pictures.items()}
    content = json.dumps([items, digests, list(systems), key], sort_keys=True)
    study = hashlib.sha256(content.encode()).hexdigest()[:12]
    addresses = {name: f"pictures/{name}.jpg" if as_files else jpeg_uri(data) for name, data in pictures.items()}
    page = {"study": study, "title": config.title, "send_to": config.send_to, "items": items, "pictures": addresses}
    told = {
        "kind": "pbe study key",
        "pbe": __version__,
        "study": study,
        "test_set": test_set.folder.resolve().name,
        "settings": asdict(config),
        "systems": list(systems),
        "items": key,
    }
    with replacing(out, overwrite) as part:
        write_text(part / PAGE, render(page))
        write_text(part / KEY, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        if as_files:
            folder = (part / PAGE).parent
            (folder / "pictures").mkdir()
            for name, data in pictures.items():
                (folder / addresses[name]).write_bytes(data)
    return study


def _draw_items(
    test_set: TestSet, systems: Mapping[str, str | Path], config: StudyConfig, on_item: Callable[[], None] | None
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]], dict[str, bytes]]:
    """The items as the page has them, the system of each result by item, and the JPEGs by name."""
    files = [result_files(test_set, folder) for folder in systems.values()]

    rng = np.random.default_rng(config.seed)
    count = min(config.num_items, len(test_set.items))
    chosen = np.sort(rng.choice(len(test_set.items), count, replace=False)).tolist()
    # Pictures are numbered at random: neither their names nor their order in the page tells whose they are.
    numbers = iter(rng.permutation(count * (2 + len(systems))).tolist())
    pictures: dict[str, bytes] = {}
    items, key = [], {}
    for i in chosen:
        item = test_set.items[i]
        image = read_rgb(item.image)
        results = [read_result(found[i], item, image) for found in files]
        shown = [reduced(one, config.size) for one in (image, read_rgb(item.exemplar), *results)]
        shown[0] = outlined(shown[0], item.repaint())
        names = [f"p{next(numbers):05d}" for _ in shown]
        pictures |= {name: jpeg(one, config.quality) for name, one in zip(names, shown, strict=True)}
        key[item.name] = dict(zip(names[2:], systems, strict=True))
        items.append(
            {
                "item": item.name,
                "image": names[0],
                "exemplar": names[1],
                "results": sorted(names[2:]),
                "aspect": round(image.width / image.height, 4),
            }
        )
        if on_item is not None:
            on_item()
    return items, key, dict(sorted(pictures.items()))


def render(study: Mapping[str, Any]) -> str:
    """The page of a study; what it shows is data that its script puts in as text, never as markup."""
    template = resources.files("pbe.evaluation.study").joinpath("study.html").read_text(encoding="utf-8")
    before, after = template.split(">STUDY<")
    return f"{before}>{embedded(study)}<{after}"


# --- pictures ---------------------------------------------------------------------------------------------


def reduced(image: Image.Image, size: int) -> Image.Image:
    """The image with its longer side reduced to `size`; smaller ones stay."""
    scale = min(1.0, size / max(image.size))
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def outlined(image: Image.Image, repaint: np.ndarray) -> Image.Image:
    """The image with a line around the region to repaint, (H, W) of any size: red, and white outside, to show on all.

    The line runs outside of the region, which stays as it is.
    """
    region = Image.fromarray(repaint.astype(np.uint8) * 255)
    region = region.resize(image.size, Image.Resampling.BOX).point(lambda value: 255 * (value > 0))
    line = max(1, round(max(image.size) / 200))
    red, white = (region.filter(ImageFilter.MaxFilter(2 * width + 1)) for width in (line, 2 * line))
    image = image.copy()
    image.paste((255, 255, 255), mask=ImageChops.subtract(white, red))
    image.paste((225, 25, 25), mask=ImageChops.subtract(red, region))
    return image


def jpeg(image: Image.Image, quality: int) -> bytes:
    """A JPEG without metadata; its colours are not subsampled, which would blur the edges of what was pasted."""
    data = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(data, format="JPEG", quality=quality, subsampling=0, optimize=True)
    return data.getvalue()
