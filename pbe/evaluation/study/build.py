"""A user study as one page: people rank several systems' results by quality and by likeness to the exemplar.

As in the study of the paper (arXiv 2211.13227), the results of an item stand side by side in random order and are
ranked twice. The page works from the disk and sends nothing; `pbe.evaluation.study.report` reads what it saves.
"""

from __future__ import annotations

import base64
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
from pbe.evaluation.test_set import Benchmark, read_result, result_files
from pbe.io.atomic import replacing

KEY, PAGE = "key.json", "page/study.html"  # in the study's folder; participants get the folder of the page alone
MAX_SYSTEMS = 9  # more cannot be told apart at once, and the page names ranks up to the 9th
MAX_INLINE = 64 * 2**20  # bytes of pictures inside the page


@dataclass(frozen=True)
class StudyConfig:
    """What a study shows: `num_items` of the benchmark, drawn by the seed (all, if it has fewer).

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
    benchmark: Benchmark,
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

    ValueError for fewer than 2 or more than 9 systems, a result of another size than its source's, or more pictures
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
    files = {system: result_files(benchmark, folder) for system, folder in systems.items()}

    rng = np.random.default_rng(config.seed)
    count = min(config.num_items, len(benchmark.items))
    chosen = np.sort(rng.choice(len(benchmark.items), count, replace=False)).tolist()
    # Pictures are numbered at random: neither their names nor their order in the page tells whose they are.
    numbers = iter(rng.permutation(count * (2 + len(systems))).tolist())
    pictures: dict[str, bytes] = {}
    items, key = [], {}
    for i in chosen:
        item = benchmark.items[i]
        source = read_rgb(item.source)
        results = [read_result(found[i], item, source) for found in files.values()]
        images = [source, read_rgb(item.reference), *results]
        images = [reduced(image, config.size) for image in images]
        images[0] = outlined(images[0], item.repaint())
        names = [f"p{next(numbers):05d}" for _ in images]
        pictures |= {name: jpeg(image, config.quality) for name, image in zip(names, images, strict=True)}
        key[item.name] = dict(zip(names[2:], systems, strict=True))
        items.append(
            {
                "item": item.name,
                "source": names[0],
                "exemplar": names[1],
                "results": sorted(names[2:]),
                "aspect": round(source.width / source.height, 4),
            }
        )
        if on_item is not None:
            on_item()
    total = sum(map(len, pictures.values()))
    if total > MAX_INLINE and not as_files:
        raise ValueError(
            f"the pictures take {total / 2**20:.0f} MiB, more than the {MAX_INLINE // 2**20} MiB that fit in one page; "
            "--files (as_files=True) puts them beside it, a smaller size, quality or number of items makes them fewer"
        )
    return _write(
        out, benchmark, list(systems), key, items, dict(sorted(pictures.items())), config, as_files, overwrite
    )


def _write(
    out: Path,
    benchmark: Benchmark,
    systems: list[str],
    key: Mapping[str, Mapping[str, str]],
    items: list[dict[str, Any]],
    pictures: Mapping[str, bytes],
    config: StudyConfig,
    as_files: bool,
    overwrite: bool,
) -> str:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in pictures.items()}
    study = hashlib.sha256(json.dumps([items, digests, systems, key], sort_keys=True).encode()).hexdigest()[:12]
    if as_files:
        sources = {name: f"pictures/{name}.jpg" for name in pictures}
    else:
        sources = {name: "data:image/jpeg;base64," + base64.b64encode(x).decode() for name, x in pictures.items()}
    shown = {"study": study, "title": config.title, "send_to": config.send_to, "items": items, "pictures": sources}
    told = {
        "kind": "pbe study key",
        "pbe": __version__,
        "study": study,
        "benchmark": benchmark.folder.resolve().name,
        "settings": asdict(config),
        "systems": systems,
        "items": key,
    }
    with replacing(out, overwrite) as part:
        page = part / PAGE
        page.parent.mkdir(parents=True)
        page.write_text(render(shown), encoding="utf-8")
        (part / KEY).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if as_files:
            (page.parent / "pictures").mkdir()
            for name, data in pictures.items():
                (page.parent / sources[name]).write_bytes(data)
    return study


def render(study: Mapping[str, Any]) -> str:
    """The page of a study; what it shows is data that its script puts in as text, never as markup."""
    template = resources.files("pbe.evaluation.study").joinpath("study.html").read_text(encoding="utf-8")
    # Escaped, because `</script>` in a string would end the element that holds it.
    data = json.dumps(study, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    before, after = template.split(">STUDY<")
    return f"{before}>{data}<{after}"


# --- pictures ---------------------------------------------------------------------------------------------


def reduced(image: Image.Image, size: int) -> Image.Image:
    """The image with its longer side reduced to `size`; smaller ones stay."""
    scale = min(1.0, size / max(image.size))
    if scale == 1:
        return image
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.LANCZOS)


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
