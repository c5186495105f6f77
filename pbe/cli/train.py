"""`pbe train`: train Paint by Example, or the autoencoder of a small one, as a YAML file says."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import signal
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import lightning

    from pbe.models.vae import AutoencoderKL
    from pbe.training.config import PaintByExampleRun, VAERun

EPILOG = """\
examples:
  %(prog)s configs/paint_by_example.yaml trainer.devices=8 trainer.num_nodes=8 trainer.strategy=ddp
  %(prog)s configs/finetune.yaml model.init=model.ckpt data.source.path=mine.csv run=runs/mine
  %(prog)s configs/finetune.yaml model.init=model.ckpt data.source.path=mine.csv run=runs/mine --resume

A run's folder gets config.yaml, metrics.jsonl, samples/ and checkpoints/step-….ckpt, which `pbe edit` takes.
"""


# arguments of lightning.Trainer that are no business of a config
OURS = ("callbacks", "logger", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing")

# 32-bit weights, computed with in 32 or 16 bits; weights of 16 bits alone would lose updates as small as these
PRECISIONS = (32, "32", "32-true", "16-mixed", "bf16-mixed")

# what Lightning warns of without reason
UNTRUE_HERE = (
    ".*dataloader is not resumable",  # its sampler is
    ".*overridden `on_before_batch_transfer` in `LightningModule`",
    ".*does not have many workers",  # their number is the user's choice
)


class Parser(argparse.ArgumentParser):
    """Errors are one line, as those of the library are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help says more)\n")


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    p = Parser(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("settings", nargs="+", metavar="SETTING", help="YAML files and overrides key=value; later ones win")
    p.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    return p


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Trains; returns the exit code."""
    args = parser(prog).parse_intermixed_args(argv)  # settings may follow --resume
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from pbe.training.config import load_config

    try:
        train(load_config(args.settings), args.resume)
    except (ValueError, OSError, ImportError, FloatingPointError, MisconfigurationException) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except SIGTERMException:
        print("stopped by SIGTERM; --resume goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    return 0


def message_of(error: Exception) -> str:
    """The message of an error; of one in a data worker, which holds the worker's traceback, its last line."""
    message = str(error)
    if re.match(r"Caught \w+ in DataLoader worker", message):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message


def train(config: PaintByExampleRun | VAERun, resume: bool = False) -> None:
    """Runs the training that `config` describes, in its folder, to its end.

    Raises before training: `ValueError` for settings that do not fit, `FileExistsError` for a folder with checkpoints
    and without `resume`, `OSError` where the folder cannot hold the run. `FloatingPointError` where training diverges.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from pbe.io.atomic import locked
    from pbe.training.callbacks.checkpoints import prepare_folder

    check_trainer(config.trainer)
    # Lightning starts the other processes later, from the same command.
    guard = nullcontext()
    if rank_zero_only.rank == 0:
        folder = Path(config.run)
        prepare_folder(folder)
        guard = locked(folder / ".lock", f"another process is training in {folder}")
    with guard:
        run(config, resume)


def run(config: PaintByExampleRun | VAERun, resume: bool) -> None:
    """What `train` does once the folder is this run's alone."""
    from lightning.pytorch.utilities import rank_zero_only

    from pbe.data.datamodule import ExampleDataModule
    from pbe.training.callbacks.checkpoints import check_room, clear_parts, list_checkpoints, step_of
    from pbe.training.callbacks.metrics import skipped_pictures
    from pbe.training.config import save_config

    folder = Path(config.run)
    checkpoints = list_checkpoints(folder / "checkpoints")
    if checkpoints and not resume:
        raise FileExistsError(
            f"{folder} has a run that came to step {step_of(checkpoints[-1])}: "
            "--resume continues it, run= begins another"
        )
    last = checkpoints[-1] if checkpoints else None
    if last:
        check_same_run(config, last)
    data = ExampleDataModule(config.data)
    data.setup("fit")  # before the networks, which take longer, and before anything is written
    if len(data.train) < config.data.batch_size:
        records = f"{len(data.train)} records of {data.train.source.name}"
        raise ValueError(f"data.batch_size={config.data.batch_size} is more than the {records}")
    trainer = make_trainer(config, folder, step_of(last) if last else 0)
    module = make_module(config)
    # The other processes find the folder as it is now.
    if rank_zero_only.rank == 0:
        adapters_only = getattr(config.training, "lora", None) is not None
        clear_parts(folder)
        check_room(folder, checkpoint_bytes(module, adapters_only) * (config.checkpoint.keep + 1 - len(checkpoints)))
        save_config(config, folder / "config.yaml")
    with warnings.catch_warnings():
        for message in UNTRUE_HERE:
            warnings.filterwarnings("ignore", message=message)
        trainer.fit(module, data, ckpt_path=last)
    skipped = skipped_pictures(trainer)
    if trainer.is_global_zero and skipped:
        counts = ", ".join(f"{n:.0f} {name.removeprefix('data/skipped_')}" for name, n in skipped.items())
        print(f"pictures that could not be used and were replaced by others: {counts.replace('_', ' ')}")


def check_same_run(config: PaintByExampleRun | VAERun, last: Path) -> None:
    """Raises `ValueError` where `config` changes what a run that came to the checkpoint `last` began with.

    The optimiser's state would go on as it was, and the records would tell of settings that were not used.
    """
    from pbe.checkpoints.formats.opening import open_checkpoint
    from pbe.training.config import to_dict

    before, now = open_checkpoint(last).extras["pbe"]["config"], to_dict(config)
    changed = []
    for section in ("task", "seed", "model", "size", "training", "optimizer", "data", "trainer"):
        old, new = flatten(before.get(section), section), flatten(now.get(section), section)
        changed += [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    changed = [key for key in changed if matters(key)]
    if changed:
        raise ValueError(
            f"--resume goes on with the settings the run began with; changed are {', '.join(changed)}. "
            "Put them back, or begin another run with run= and model.init= this one's checkpoint"
        )


def matters(key: str) -> bool:
    """Whether a run that goes on with another value of a setting would not be the same run."""
    if key.startswith("trainer."):
        return key in ("trainer.accumulate_grad_batches", "trainer.precision", "trainer.gradient_clip_val")
    # Files may have moved, and batches are smaller with more devices; the checkpoint knows what must stay.
    files = (".path", ".images", "model.init", "model.vae")
    return not key.endswith((*files, "data.workers", "data.batch_size", "training.gradient_checkpointing"))


def flatten(value: Any, prefix: str) -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name, x in value.items() for key, leaf in flatten(x, f"{prefix}.{name}").items()}


def make_module(config: PaintByExampleRun | VAERun) -> lightning.LightningModule:
    from pbe.data.datamodule import check_sizes
    from pbe.training.config import PaintByExampleRun, to_dict
    from pbe.training.initialization import starting_model, starting_vae
    from pbe.training.module import PaintByExampleTraining
    from pbe.training.vae import VAETraining

    about = {"trained_on": f"{config.data.source.kind} {config.data.source.path}", "config": to_dict(config)}
    if isinstance(config, PaintByExampleRun):
        model = starting_model(config.model, config.seed)
        check_sizes(config.data, model.config.vae.downsampling, model.config.exemplar.vision.image_size)
        return PaintByExampleTraining(model, config.training, config.optimizer, about, config.seed)
    if config.init == "scratch" and config.training.train == "decoder":
        raise ValueError("training.train=decoder needs init=, a checkpoint whose encoder stays as it is")
    vae = starting_vae(config.size, config.seed) if config.init == "scratch" else trained_vae(config)
    return VAETraining(vae, config.training, config.optimizer, about)


def trained_vae(config: VAERun) -> AutoencoderKL:
    """The autoencoder in the checkpoint `config.init`; its latents are measured anew where its encoder trains."""
    from pbe.checkpoints.meta_device import build_on_meta
    from pbe.models.vae import AutoencoderKL
    from pbe.training.initialization import VAE_PREFIX, read_vae

    size, state = read_vae(config.init)
    if config.training.train == "all":
        size = dataclasses.replace(size, latent_scale=1.0)
    vae = build_on_meta(AutoencoderKL, size)
    vae.load_state_dict({name.removeprefix(VAE_PREFIX): x for name, x in state.items()}, assign=True)
    return vae


def checkpoint_bytes(module: lightning.LightningModule, adapters_only: bool) -> int:
    """About how large a checkpoint is: what trains with AdamW's two moments of it, and the rest of the state."""
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    rest = sum(x.nbytes for x in module.state_dict().values()) - trained
    return 3 * trained + (0 if adapters_only else rest)


def check_trainer(arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what `lightning.Trainer` does not take, or is decided by this program."""
    from lightning.pytorch import Trainer

    known = inspect.signature(Trainer).parameters.keys()
    for name in arguments:
        if name in OURS:
            raise ValueError(f"trainer.{name} is decided by this program, not by the config")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean trainer.{close[0]}?" if close else ""
            raise ValueError(f"trainer.{name} is no argument of lightning.Trainer{hint}")
    precision = arguments.get("precision", 32)
    if precision not in PRECISIONS:
        choices = ", ".join(str(known) for known in PRECISIONS[2:])
        raise ValueError(f"trainer.precision={precision} is not one of {choices}")


def make_trainer(config: PaintByExampleRun | VAERun, folder: Path, step: int) -> lightning.Trainer:
    """The trainer of a run that begins after `step` optimiser steps."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from pbe.training.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints
    from pbe.training.callbacks.metrics import JSONLinesLogger, TrainingMetrics
    from pbe.training.callbacks.samples import SampleGrids
    from pbe.training.config import PaintByExampleRun

    callbacks = [TrainingMetrics(), Checkpoints(folder / "checkpoints", config.checkpoint)]
    if isinstance(config, PaintByExampleRun) and config.samples.every_n_steps:
        callbacks.append(SampleGrids(folder / "samples", config.samples))
    loggers = [JSONLinesLogger(folder / "metrics.jsonl", step)]
    if find_spec("tensorboard"):  # the extra `log`
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        value = config.trainer.get(name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"trainer.{name} must be an integer of at least 1, got {value!r}")
    shards = str(config.trainer.get("strategy", "")).startswith(("fsdp", "deepspeed"))  # which write files of their own
    try:
        return Trainer(
            **config.trainer,
            callbacks=callbacks,
            logger=loggers,
            plugins=[] if shards else [AtomicCheckpointIO()],
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
    except TypeError as error:  # how Lightning meets a text where it wants a number
        raise ValueError(f"lightning.Trainer does not take trainer={dict(config.trainer)}: {error}") from error
