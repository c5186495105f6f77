"""`pbe edit`: repaint the masked part of a photo as the object of an exemplar, or a batch of such edits."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.batch.job import COLUMNS, FILES, NUMBERS, RENAMED, WHERE, Job, read_inputs, run_job
from pbe.batch.provenance import (
    Weights,
    check_writable,
    checksums,
    identify,
    provenance_of,
    save_result,
)
from pbe.batch.run import Outcome, is_done, read_jobs, run_row
from pbe.cli.comparison import comparison, runs, variants
from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_model, add_renamed, add_settings, files_beside, flag, load_for
from pbe.editing.loading import AdaptedModels, check_memory, distilled_for, dtype_for
from pbe.editing.settings import COUNT, SETTINGS, EditSettings
from pbe.io.fields import check

if TYPE_CHECKING:
    from PIL import Image
    from tqdm import tqdm

    from pbe.checkpoints.adapters import AdapterLike
    from pbe.sampling import StepInfo

EPILOG = f"""\
examples:
  %(prog)s --image cat.png --mask mask.png --exemplar dog.png --ckpt model.ckpt --out edited.png
  %(prog)s --image cat.png --box 40,60,200,220 --exemplar dog.png --ckpt model.ckpt --out results/ -n 4 --grid
  %(prog)s --image cat.png --region hat.png cap.png --region 40,60,90,99 bow.png --ckpt model.ckpt --out edited.png
  %(prog)s --batch rows.csv --ckpt model.ckpt

A batch file has one edit per row: a CSV file with a header, or JSONL. Its columns are
  {", ".join(FILES)},
  {", ".join(SETTINGS)};
further regions have mask_2 (box_2, polygon_2), exemplar_2, … guidance_2, strength_2, seed_2, up to _{NUMBERS[-1]};
paths in it are relative to its folder, several exemplars, or adapters as FILE[:STRENGTH], are separated by ';' (in
JSONL: a list), and where a row is silent, the flags hold. A row whose picture is there, made with the same settings,
inputs, checkpoint and adapters, is skipped.

exit code: 0 all done, 1 some rows failed, 2 nothing could be done, 130 interrupted
"""
LOSSY = "JPEG changes all pixels a little; to keep those outside the mask bit for bit save PNG, TIFF or WebP"


def parser(prog: str | None = None) -> Parser:
    p = Parser(
        prog=prog,
        usage="%(prog)s --image FILE --mask FILE --exemplar FILE --ckpt FILE --out FILE [flags below]\n"
        "       %(prog)s --batch ROWS --ckpt FILE [flags below]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    g = p.add_argument_group("pictures")
    g.add_argument("--image", metavar="FILE", help="the photo; it keeps its size, and its pixels outside the mask")
    mask = "white = repaint; without it what --extend adds or what is transparent"
    g.add_argument("--mask", metavar="FILE", help=mask)
    g.add_argument("--box", metavar="X0,Y0,X1,Y1", help="repaint this box, in pixels")
    g.add_argument("--select", metavar="X,Y", help="repaint the object at this point, or in a rough box X0,Y0,X1,Y1")
    g.add_argument("--polygon", metavar="'X,Y X,Y X,Y'", help="repaint this polygon, in pixels")
    g.add_argument(
        "--exemplar",
        nargs="+",
        metavar="[COLOUR=]FILE",
        help="the object; of several, the mean condition is used. As ff0000=FILE, or 1=FILE for index pictures, it is "
        "painted where --mask has that colour",
    )
    g.add_argument("--exemplar-mask", nargs="+", metavar="FILE", help="where it is in each picture, white = object")
    g.add_argument("--exemplar-select", metavar="X,Y", help="it is at this point, or in a rough box X0,Y0,X1,Y1")
    g.add_argument("--exemplar-weights", metavar="W,W", help="weights of several exemplars (default: equal)")
    g.add_argument(
        "--region",
        nargs=2,
        action="append",
        metavar=("MASK", "EXEMPLAR"),
        help="a region with an exemplar of its own: a mask picture, a box or a polygon, and a picture; may be given "
        "several times, the later ones on top",
    )
    g.add_argument("--negative", nargs="+", metavar="FILE", help="what guidance leads away from: not like these")
    g.add_argument("--negative-mask", nargs="+", metavar="FILE", help="where it is in each picture, white = object")
    g.add_argument("--negative-weights", metavar="W,W", help="weights of several (default: equal)")
    g.add_argument(
        "--out",
        metavar="FILE",
        help="the result: .png, .jpg, .tif or .webp, replaced if it exists. Several are called NAME-SEED.png; in a "
        "folder (existing, or ending in /) they are called after the photo",
    )
    g.add_argument("-n", "--num-images", type=int, metavar="N", help="how many results (default 1)")
    g.add_argument("--batch-size", type=int, metavar="N", help="results sampled at a time (default 4)")
    g.add_argument("--preview", metavar="FILE", help="a small picture of what is being painted, rewritten as it goes")

    add_model(p.add_argument_group("model"))
    about = "A distilled model begins with the sampler, steps and guidance that it was distilled for."
    add_settings(p.add_argument_group("settings", about))

    g = p.add_argument_group("comparisons, which make --out one picture; the results are saved beside it")
    g.add_argument("--grid", action="store_true", default=None, help="image | masked | exemplar | results")
    g.add_argument("--sweep-guidance", metavar="1,3,5,7", help="a result for each of these guidance scales")
    g.add_argument("--seeds", metavar="1..8", help="a result for each of these seeds; also 1,5,9")

    g = p.add_argument_group("batches")
    g.add_argument("--batch", type=Path, metavar="ROWS", help="a .csv or .jsonl file, see below")
    g.add_argument("--redo", action="store_true", help="also do the rows that are done")
    g.add_argument("--devices", type=int, metavar="N", default=1, help="divide the rows over N devices (default 1)")
    g.add_argument("--num-nodes", type=int, metavar="N", default=1, help="and over N nodes (default 1)")

    p.add_argument("--quiet", action="store_true", help="no progress bar")
    add_renamed(p, {**RENAMED, "sweep_scale": "sweep_guidance", "raw": "no_composite"})
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser(prog).parse_args(argv)
    with one_line_warnings(), photos_of_any_size():
        check_memory(args.low_memory, args.compile)
        return edit_batch(args) if args.batch else edit_one(args)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # other packages' deprecations, on which a user cannot act
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        yield


@contextmanager
def photos_of_any_size() -> Iterator[None]:
    """Lifts Pillow's bound on pixels: it is for what strangers upload, and these files are the user's own."""
    from PIL import Image

    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def say(message: str) -> None:
    """A line on stderr that does not run into the progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


# --- one photo --------------------------------------------------------------------------------------------


def edit_one(args: argparse.Namespace) -> int:
    for name, other in (("seeds", "seed"), ("seeds", "num_images"), ("sweep_guidance", "guidance")):
        if getattr(args, name) is not None and getattr(args, other) is not None:
            raise ValueError(f"{flag(name)} and {flag(other)} contradict each other")
    if args.devices != 1 or args.num_nodes != 1 or args.redo:
        raise ValueError("--devices, --num-nodes and --redo need --batch")
    num_images = 1 if args.num_images is None else args.num_images
    batch_size = 4 if args.batch_size is None else args.batch_size
    for name, count in (("num_images", num_images), ("batch_size", batch_size)):
        check(flag(name), count, COUNT)
    given = {name: getattr(args, name, None) for name in COLUMNS} | region_columns(args)
    job = Job.from_row(given, distilled=lambda _: distilled_for(args.ckpt, args.adapter))
    jobs, grid_path = variants(args, job, num_images)
    inputs = read_inputs(job)
    weights, crc32 = weights_of(args, args.adapter), checksums(job)
    provenance = {key: provenance_of(variant, weights, crc32) for key, variant in jobs.items()}
    for key, variant in jobs.items():
        check_writable(variant.path(variant.out), inputs.photo, provenance[key])
    preview = partial(save_preview, Path(args.preview)) if args.preview else None
    if preview:
        replace(job, out=args.preview)  # ValueError where it is one of the inputs
        if Path(args.preview).resolve() in [variant.path(variant.out).resolve() for variant in jobs.values()]:
            raise ValueError(f"--preview {args.preview} is also a result: it would be overwritten")
        preview([inputs.picture.to_rgb8()])  # what cannot be written shows now
    if is_lossy(job.out):
        say(f"note: {LOSSY}")

    model = load_for(args)
    scales, seeds = (list(dict.fromkeys(values)) for values in zip(*jobs, strict=True))
    batches = sum(-(-count // batch_size) for _, count in runs(seeds))
    steps = job.settings.steps_taken * max(len(inputs.regions), 1)
    results = {}
    with progress_bar(args, total=len(scales) * batches * steps, unit="step") as bar:
        for guidance, (seed, count) in product(scales, runs(seeds)):
            tell = partial(advance, bar)
            images = run_job(model, jobs[guidance, seed], inputs, count, batch_size, tell, preview)
            for key, image in zip([(guidance, seed + i) for i in range(count)], images, strict=True):
                results[key] = image
                save_result(image, jobs[key].path(jobs[key].out), provenance[key])
    if grid_path:
        from pbe.images.saving import save_picture

        save_picture(comparison(inputs, results, scales, seeds), grid_path)
    return 0


def region_columns(args: argparse.Namespace) -> dict[str, object]:
    """What --region says, by column: the regions after that of --mask and --exemplar, if that is given."""
    has_first = any(getattr(args, name) is not None for name in (*WHERE, "exemplar"))
    columns: dict[str, object] = {}
    for n, (mask, exemplar) in enumerate(args.region or (), 2 if has_first else 1):
        if n > NUMBERS[-1]:
            raise ValueError(f"there are more than {NUMBERS[-1]} regions; pbe.edit_regions takes any number")
        numbers = re.findall(r"[\d.]+", mask) if re.fullmatch(r"[\d.,\s]*,[\d.,\s]*", mask) else []
        kind = {0: "mask", 4: "box"}.get(len(numbers), "polygon")
        end = "" if n == 1 else f"_{n}"
        columns |= {kind + end: mask, f"exemplar{end}": [exemplar]}
    return columns


def save_preview(path: Path, pictures: Sequence[Image.Image], _: object = None) -> None:
    """Saves pictures of one size side by side, of at most 256 pixels each."""
    import numpy as np
    from PIL import Image

    from pbe.images.saving import save_picture

    row = Image.fromarray(np.hstack([np.asarray(picture) for picture in pictures]))
    row.thumbnail((256 * len(pictures), 256))
    save_picture(row, path)


# --- many photos ------------------------------------------------------------------------------------------


def edit_batch(args: argparse.Namespace) -> int:
    alone = (*FILES, "region", "preview", "grid", "sweep_guidance", "seeds", "num_images", "batch_size")
    given = [flag(name) for name in alone if getattr(args, name, None) is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be given with --batch: each row is one edit with its own files")
    if args.devices < 1 or args.num_nodes < 1:
        raise ValueError(f"--devices and --num-nodes must be at least 1, got {args.devices} and {args.num_nodes}")
    defaults = {name: getattr(args, name) for name in SETTINGS}
    distilled, weights = cache(partial(distilled_for, args.ckpt)), cache(partial(weights_of, args))
    EditSettings.from_texts(defaults, distilled(tuple(args.adapter)))  # a wrong flag is not the rows' fault
    jobs, outcomes = read_jobs(args.batch, defaults, lambda job: distilled(job.with_adapters(args.adapter)))
    rows = [(job, job.with_adapters(args.adapter)) for job in jobs]
    are_done = (is_done(job, weights(adapters)) for job, adapters in rows)
    if args.devices * args.num_nodes > 1 and (args.redo or not all(are_done)):
        from pbe.batch.distributed import divide, row_runner

        form = (args.dtype, args.low_memory, args.compile)
        set_up = row_runner(jobs, args.ckpt, *form, args.redo, *files_beside(args))
        shared = divide(len(jobs), set_up, args.device, args.devices, args.num_nodes, not args.quiet)
        if shared is None:  # the first process reports for all
            return 0
        outcomes += shared
    else:
        load = AdaptedModels(partial(load_for, args))
        with progress_bar(args, total=len(jobs), unit="row") as bar:
            tell = partial(show_step, bar)
            for job, adapters in rows:
                outcomes.append(run_row(partial(load, adapters), job, weights(adapters), args.redo, tell))
                bar.update()
    return report(jobs, outcomes)


def report(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> int:
    """Prints what became of the rows; returns the exit code."""
    count = Counter(outcome.status for outcome in outcomes)
    rows = "1 row" if len(outcomes) == 1 else f"{len(outcomes)} rows"
    print(f"{rows}: {count['done']} done, {count['skipped']} done before, {count['failed']} failed", flush=True)
    for outcome in sorted(outcomes):
        if outcome.status == "failed":
            print(f"line {outcome.line} failed: {outcome.reason}", file=sys.stderr)
    if any(is_lossy(job.out) for job in jobs):
        say(f"note: {LOSSY}")
    return 1 if count["failed"] else 0


# --- both -------------------------------------------------------------------------------------------------


def weights_of(args: argparse.Namespace, adapters: Sequence[AdapterLike]) -> Weights:
    return identify(args.ckpt, dtype_for(args.ckpt, args.dtype, args.device), *files_beside(args, adapters))


def is_lossy(out: str) -> bool:
    return Path(out).suffix.lower() in (".jpg", ".jpeg")


def progress_bar(args: argparse.Namespace, total: int, unit: str) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=args.quiet, file=sys.stderr)


def show_step(bar: tqdm, step: StepInfo) -> None:
    bar.set_postfix_str(f"step {step.index + 1}/{step.steps}")


def advance(bar: tqdm, step: StepInfo) -> None:
    # How many regions are edited one by one is not known before: each adds its steps when it begins.
    bar.total = max(bar.total or 0, bar.n + step.steps - step.index)
    bar.update()
