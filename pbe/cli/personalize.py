"""`pbe personalize`: teach a model one object, from three to ten pictures of it, as adapters."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser, add_force, check_output

EPILOG = """\
examples:
  %(prog)s model.ckpt --pictures my_bag --out my_bag.safetensors
  %(prog)s model.ckpt --pictures my_bag --masks my_bag_masks --prior photos.csv --out my_bag.safetensors
  pbe edit --ckpt model.ckpt --adapter my_bag.safetensors --exemplar my_bag/1.jpg …

It is a training run as those of `pbe train`: its folder gets metrics.jsonl, samples/ and checkpoints/.
Finding masks needs OpenCV: pip install -e .[masks]
"""
HELP = {
    "pictures": "the pictures of the object",
    "out": "the adapters, ending in .safetensors",
    "masks": "masks of the object (white), named as its pictures; where there is none, alpha is, or it is found",
    "prior": "photos with boxes, as training reads them: the object is put into them too, and they keep other objects "
    "as they are (default: results of the model itself do)",
    "steps": "of training (default: 100, and 50 for each picture)",
    "rank": "of the adapters (default 16)",
    "seed": "of all that is random (default 0)",
    "run": "the run's folder (default: runs/ and the name of --out)",
}


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ckpt", metavar="CKPT", help="the checkpoint to adapt, or demo, the small model of this package")
    p.add_argument("settings", nargs="*", metavar="SETTING", help="of the run, key=value, as `pbe train` has them")
    for name, metavar in (
        ("pictures", "DIR"),
        ("out", "FILE"),
        ("masks", "DIR"),
        ("prior", "MANIFEST"),
        ("run", "DIR"),
    ):
        required = name in ("pictures", "out")
        p.add_argument(f"--{name}", type=Path, required=required, metavar=metavar, help=HELP[name])
    for name, default in (("steps", None), ("rank", 16), ("seed", 0)):
        p.add_argument(f"--{name}", type=int, default=default, metavar="N", help=HELP[name])
    p.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint, if it has one")
    add_force(p)
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Trains the adapters; returns the exit code."""
    args = parser(prog).parse_intermixed_args(argv)
    from pbe.training.callbacks.stopping import Terminated

    try:
        return run(args)
    except Terminated as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum


def run(args: argparse.Namespace) -> int:
    from pbe.checkpoints.adapter_writing import check_adapter_path
    from pbe.editing.settings import quick_settings
    from pbe.io.atomic import replacing, write_text
    from pbe.training.config import load_config
    from pbe.training.personalization import picture_files, run_settings
    from pbe.training.resuming import newest_checkpoint
    from pbe.training.run import train
    from pbe.training.task import beside

    check_output(args)
    check_adapter_path(args.out, "diffusers")
    if not find_spec("safetensors"):
        raise ImportError(f"writing {args.out} needs the extra safetensors: pip install safetensors")
    folder = args.run or Path("runs", args.out.stem)
    if not args.resume and newest_checkpoint(folder):
        raise FileExistsError(f"{folder} has a run with checkpoints: --resume continues it, --run DIR begins another")
    count = len(picture_files(args.pictures))
    steps = 100 + 50 * count if args.steps is None else args.steps
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    numbers = {"steps": steps, "rank": args.rank, "seed": args.seed}
    settings = run_settings(args.ckpt, folder, quick_settings(args.ckpt), **numbers, prior=args.prior)
    write_text(folder / "personalize.yaml", json.dumps(settings, indent=2))  # JSON is YAML
    config = load_config([str(folder / "personalize.yaml"), *args.settings])
    prepare(args, folder, "cpu" if config.trainer.get("accelerator") == "cpu" else "auto")
    train(config, args.resume)
    last = newest_checkpoint(Path(config.run))
    assert last is not None
    with replacing(args.out, args.force) as part:
        shutil.copyfile(beside(last), part)
    print(f"{args.out}: adapters of {count} pictures; use them with --adapter {args.out}")
    return 0


def prepare(args: argparse.Namespace, folder: Path, device: str) -> None:
    """Writes the run's data, where they are not there to go on with."""
    from tqdm import tqdm

    from pbe.editing.loading import load_editor
    from pbe.editing.settings import quick_settings
    from pbe.training.initialization import ModelConfig, known_size, starting_model
    from pbe.training.personalization import RESULTS, read_views, write_object, write_results

    if known_size(model := ModelConfig(init=args.ckpt)) is None:
        starting_model(model, args.seed)  # says what is wrong
    mine, prior = folder / "object", folder / "prior"
    if not (args.resume and mine.is_dir()):
        write_object(list(tqdm(read_views(args.pictures, args.masks), desc="masks", unit=" pictures")), mine)
    if args.prior is None and not (args.resume and prior.is_dir()):
        editor, total = load_editor(Path(args.ckpt), device), RESULTS * len(list(mine.glob("*_mask.png")))
        results = write_results(editor, mine, prior, quick_settings(args.ckpt), args.seed)
        list(tqdm(results, total=total, desc="own results", unit=" pictures"))
