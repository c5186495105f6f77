"""`pbe personalize`: teach a model one object, from three to ten pictures of it, as adapters."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from pbe.cli import train
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


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ckpt", metavar="CKPT", help="the checkpoint to adapt, or demo, the small model of this package")
    p.add_argument("settings", nargs="*", metavar="SETTING", help="of the run, key=value, as `pbe train` has them")
    p.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="the pictures of the object")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the adapters, ending in .safetensors")
    masks = "the object's masks (white), named as its pictures (default: their alpha, or what GrabCut finds)"
    p.add_argument("--masks", type=Path, metavar="DIR", help=masks)
    prior = (
        "ordinary photos with boxes, to put the object into and to keep others by (default: the model's own results)"
    )
    p.add_argument("--prior", type=Path, metavar="MANIFEST", help=prior)
    p.add_argument("--steps", type=int, metavar="N", help="of training (default: 100, and 50 for each picture)")
    p.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapters (default 16)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default 0)")
    p.add_argument("--run", type=Path, metavar="DIR", help="the run's folder (default: runs/ and the name of --out)")
    p.add_argument("--resume", action="store_true", help="continue from the run's newest checkpoint, if it has one")
    add_force(p)
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Trains the adapters; returns the exit code."""
    args = parser(prog).parse_intermixed_args(argv)
    from pbe.checkpoints.adapter_writing import check_adapter_path
    from pbe.editing.settings import quick_settings
    from pbe.io.atomic import replacing, write_text
    from pbe.training.config import load_config
    from pbe.training.personalization import pictures_of, run_settings
    from pbe.training.resuming import newest_checkpoint
    from pbe.training.task import beside

    check_output(args)
    check_adapter_path(args.out, "diffusers")
    if not find_spec("safetensors"):
        raise ImportError(f"writing {args.out} needs the extra safetensors: pip install safetensors")
    folder = args.run or Path("runs", args.out.stem)
    if not args.resume and newest_checkpoint(folder):
        raise FileExistsError(f"{folder} has a run with checkpoints: --resume continues it, --run DIR begins another")
    pictures = pictures_of(args.pictures, args.masks)
    steps = 100 + 50 * len(pictures) if args.steps is None else args.steps
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    numbers = {"steps": steps, "rank": args.rank, "seed": args.seed}
    settings = run_settings(args.ckpt, folder, quick_settings(args.ckpt), **numbers, prior=args.prior)
    write_text(folder / "personalize.yaml", json.dumps(settings, indent=2))  # JSON is YAML
    config = load_config([str(folder / "personalize.yaml"), *args.settings])
    prepare(args, folder, pictures, "cpu" if config.trainer.get("accelerator") == "cpu" else "auto")
    if code := train.run(config, args.resume):
        return code
    last = newest_checkpoint(Path(config.run))
    assert last is not None
    with replacing(args.out, args.force) as part:
        shutil.copyfile(beside(last), part)
    print(f"{args.out}: adapters of {len(pictures)} pictures; use them with --adapter {args.out}")
    return 0


def prepare(args: argparse.Namespace, folder: Path, pictures: Mapping[Path, Path | None], device: str) -> None:
    """Writes the run's data, where they are not there to go on with."""
    from tqdm import tqdm

    from pbe.editing.loading import load_editor
    from pbe.editing.settings import quick_settings
    from pbe.training.initialization import ModelConfig, known_size, starting_model
    from pbe.training.personalization import RESULTS, write_object, write_results

    if known_size(model := ModelConfig(init=args.ckpt)) is None:
        starting_model(model, args.seed)  # says what is wrong
    mine, prior = folder / "object", folder / "prior"
    if not (args.resume and mine.is_dir()):
        list(tqdm(write_object(pictures, mine), total=len(pictures), desc="pictures"))
    if args.prior is None and not (args.resume and prior.is_dir()):
        results = write_results(load_editor(Path(args.ckpt), device), mine, prior, quick_settings(args.ckpt), args.seed)
        list(tqdm(results, total=RESULTS * len(pictures), desc="own results"))
