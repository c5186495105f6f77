"""`pbe show-data`: write pictures of training examples at every stage, to be looked at before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser

if TYPE_CHECKING:
    from PIL import Image

    from pbe.data.recipe import Stages
    from pbe.images.windows import Box

STAGES = ("photo", "window", "mask", "masked", "crop", "exemplar", "target")
COLOURS = {"box": (230, 30, 30), "grown": (255, 170, 0), "exemplar_box": (30, 160, 60), "window": (30, 90, 255)}


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    p.add_argument(
        "config",
        nargs="+",
        help="YAML files and settings as for training, such as data.source.path=boxes.csv",
    )
    p.add_argument("--out", type=Path, required=True, help="folder for grid.png and one picture per stage and example")
    p.add_argument("-n", type=int, default=16, help="how many examples (default 16)")
    p.add_argument("--epoch", type=int, default=0, help="the epoch whose examples are shown (default 0)")
    split = p.add_mutually_exclusive_group()
    split.add_argument("--val", action="store_true", help="show validation examples")
    split.add_argument("--test", action="store_true", help="show test examples")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Writes the pictures; returns the exit code."""
    args = parser(prog).parse_intermixed_args(argv)  # settings may follow --out
    from pbe.data.datamodule import ExampleDataModule
    from pbe.training.config import load_config

    if args.n < 1:
        raise ValueError(f"-n must be at least 1, got {args.n}")
    data = ExampleDataModule(load_config(args.config).data)
    data.setup("test" if args.test else "fit")
    dataset = data.test if args.test else data.val if args.val else data.train
    if dataset is None:
        raise ValueError("there are no validation examples: set data.val_source or data.val_size")
    dataset.set_epoch(args.epoch)
    # Spread over the source, whose neighbours are often alike.
    n = min(args.n, len(dataset))
    write([dataset.stages(i * len(dataset) // n) for i in range(n)], args.out)
    skipped = {reason: count for reason, count in dataset.skipped.items() if count}
    print(f"{args.out / 'grid.png'}: {n} examples" + (f"; skipped: {skipped}" if skipped else ""))
    return 0


def write(samples: list[Stages], out: Path) -> None:
    """Writes `grid.png`, with one row per example, and each of its pictures as `<number>_<stage>.png`."""
    from pbe.images.saving import save_picture

    rows = [stage_pictures(stages) for stages in samples]
    for number, row in enumerate(rows):
        for stage, picture in zip(STAGES, row, strict=True):
            save_picture(picture, out / f"{number:02}_{stage}.png")
    save_picture(sheet(samples, rows), out / "grid.png")


def sheet(samples: list[Stages], rows: list[list[Image.Image]] | None = None) -> Image.Image:
    """One picture with a row per example; `rows`: their pictures, where they are drawn already."""
    from pbe.images.grids import grid

    captions = [captions_of(stages) for stages in samples]
    return grid(rows or list(map(stage_pictures, samples)), captions, column_labels=STAGES, cell_height=224)


def stage_pictures(stages: Stages) -> list[Image.Image]:
    """One picture for each of STAGES."""
    import torch
    from torchvision.transforms.v2.functional import to_pil_image

    from pbe.models.clip import CLIP_MEAN, CLIP_STD

    example = stages.example
    source, masked, target = (x / 2 + 0.5 for x in (example.source, example.masked_image, example.image))
    tinted = source + (1 - example.mask) * 0.5 * (torch.tensor([1.0, 0.2, 0.2])[:, None, None] - source)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    exemplar = (example.exemplar * std + mean).clamp(0, 1)
    tensors = (source, tinted, masked, stages.pixels.exemplar_crop, exemplar, target)
    return [photo_with_boxes(stages), *map(to_pil_image, tensors)]


def photo_with_boxes(stages: Stages, side: int = 640) -> Image.Image:
    """The whole photo with the geometry's boxes and outline drawn in."""
    from PIL import ImageDraw
    from torchvision.transforms.v2.functional import to_pil_image

    from pbe.data.crop import Photo
    from pbe.images.windows import Box

    geometry = stages.geometry
    with Photo(stages.record.image) as photo:
        height, width = photo.size
        scale = side / max(height, width)
        size = (round(height * scale), round(width * scale))
        picture = to_pil_image(photo.read([Box(0, 0, width, height)], [size], antialias=True)[0])
    draw = ImageDraw.Draw(picture)

    def frame(box: Box, colour: tuple[int, int, int]) -> None:
        x0, y0, x1, y1 = (round(value * scale) for value in box)
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=3)

    for name, colour in COLOURS.items():
        if name != "exemplar_box" or geometry.donor is None:  # a donor's is part of another photo
            frame(getattr(geometry, name), colour)
    if geometry.outline is not None:
        points = [tuple(point) for point in (geometry.outline * scale).tolist()]
        draw.line([*points, points[0]], fill=(255, 255, 255), width=2)
    return picture


def captions_of(stages: Stages) -> list[str]:
    """What is worth saying about each of STAGES."""
    record, geometry = stages.record, stages.geometry
    label = record.labels[geometry.object] if record.labels else record.image.name
    shape = "object" if geometry.outline is None else "box" if len(geometry.outline) == 4 else "Bezier"
    repainted = 1 - stages.example.mask.mean().item()
    elsewhere = geometry.donor.image if geometry.donor is not None else record.exemplar
    return [
        label,
        f"{geometry.window.width}x{geometry.window.height} at {geometry.window.x0},{geometry.window.y0}",
        f"{shape}, {repainted:.0%}",
        "",
        f"{geometry.exemplar_box.width}x{geometry.exemplar_box.height}" if elsewhere is None else elsewhere.name,
        "",
        "" if record.target is None else record.target.name,
    ]
