"""A training run, from its config to its end: the checks before it, its trainer, its module, its folder."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from pbe.batch.provenance import crc_of
from pbe.checkpoints.formats.opening import find_checkpoint
from pbe.data.datamodule import ExampleDataModule, check_sizes
from pbe.evaluation.lpips import LPIPS, load_perceptual
from pbe.io.atomic import locked
from pbe.io.suggest import did_you_mean
from pbe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from pbe.models.tiny_autoencoder import TinyDecoder
from pbe.models.vae import AutoencoderKL
from pbe.training.callbacks.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    check_room,
    clear_parts,
    list_checkpoints,
    prepare_folder,
)
from pbe.training.callbacks.loggers import make_loggers
from pbe.training.callbacks.metrics import TrainingMetrics
from pbe.training.callbacks.progress import StepsBar
from pbe.training.callbacks.samples import SampleGrids
from pbe.training.callbacks.stopping import Patience, StopSignals
from pbe.training.config import (
    DistillationRun,
    ModelRun,
    PaintByExampleRun,
    Run,
    TinyDecoderRun,
    VAERun,
    save_config,
    to_dict,
)
from pbe.training.distillation import ConsistencyDistillation
from pbe.training.dry_run import describe
from pbe.training.encodings import encoded
from pbe.training.initialization import loaded_vae, seeded, starting_model
from pbe.training.module import PaintByExampleTraining
from pbe.training.optimizer import KINDS, optimizer_class
from pbe.training.resuming import newest_checkpoint, read_entries, restoring
from pbe.training.sharding import ShardedStrategy
from pbe.training.task import TrainingTask
from pbe.training.tiny_decoder import TinyDecoderTraining
from pbe.training.vae import VAETraining

# arguments of lightning.Trainer that the config has no say in
OURS = ("callbacks", "logger", "plugins", "default_root_dir", "use_distributed_sampler", "enable_checkpointing")

# 32-bit weights, computed with in 32 or 16 bits; weights of 16 bits alone would lose updates as small as these
PRECISIONS = (32, "32", "32-true", "16-mixed", "bf16-mixed")

# of a config, whose values a run goes on with
SECTIONS = ("task", "seed", "model", "size", "training", "distillation", "optimizer", "data", "encodings", "trainer")

# what Lightning warns of without reason
UNTRUE_HERE = (
    ".*dataloader is not resumable",  # its sampler is
    ".*overridden `on_before_batch_transfer` in `LightningModule`",
    ".*does not have many workers",  # their number is the user's choice
    "Total length of `list` across ranks is zero",  # of validation, where there is none
)


def train(config: Run, resume: bool | Path = False) -> dict[str, int]:
    """Runs the training that `config` describes, in its folder, to its end.

    resume: whether it goes on from the folder's newest checkpoint, if there is one; or the checkpoint from which.

    Returns how many pictures could not be used, over all processes, by split and reason; in the first process alone.

    Raises before training: `ValueError` for settings that do not fit or a checkpoint that is damaged or another run's,
    `FileExistsError` for a folder with checkpoints and without `resume`, `OSError` where the folder cannot hold the
    run. `FloatingPointError` where training diverges, `Terminated` where it is stopped by a signal.
    """
    check_trainer(config.trainer)
    optimizer_class(config.optimizer.name)  # whose package may be missing
    folder, stop = Path(config.run), StopSignals()
    with stop.handled(), lightning_errors(), quiet(), claimed(folder):
        last = resume if isinstance(resume, Path) else newest_checkpoint(folder)
        if last:
            check_resume(config, last, bool(resume))
        data = open_data(config)  # before the networks, which take longer, and before anything is written
        metrics = TrainingMetrics()
        trainer = make_trainer(config, folder, metrics, stop)
        module = make_module(config)
        if is_first_process():  # the other processes find the folder as it is now
            clear_parts(folder)
            kept = config.checkpoint.keep + 1 + config.checkpoint.best - len(list_checkpoints(folder / "checkpoints"))
            check_room(folder, checkpoint_bytes(module) * kept)
            save_config(config, folder / "config.yaml")
        if isinstance(config, ModelRun) and config.encodings.folder:
            use_encodings(config, data, module, trainer)
        with restoring(last, stop) if last else nullcontext():
            trainer.fit(module, data, ckpt_path=last)
        skipped = metrics.skipped_pictures(trainer, data.skipped)
        return {name.removeprefix("data/skipped_"): int(n) for name, n in skipped.items()} if is_first_process() else {}


def dry_run(config: Run) -> tuple[list[str], ExampleDataModule]:
    """Lines that describe the training of `config`, and its data; nothing trains or is written. Raises as `train`."""
    check_trainer(config.trainer)
    optimizer_class(config.optimizer.name)
    data = open_data(config)
    return describe(config, make_module(config), data), data


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Turns Lightning's exception for settings into `ValueError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advertisements, untrue warnings, and what other packages deprecate among themselves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in UNTRUE_HERE:
            warnings.filterwarnings("ignore", message=message)
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module="lightning|torch")
        yield


def is_first_process() -> bool:
    """Whether this is the process that the command started; Lightning starts the others later, by the same command."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder exists, and is this run's alone. OSError where it cannot be written, or another process has it."""
    if not is_first_process():
        yield
        return
    prepare_folder(folder)
    with locked(folder / ".lock", f"another process is training in {folder}"):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def check_trainer(arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what `lightning.Trainer` does not take, or is decided by this program."""
    known = inspect.signature(Trainer).parameters.keys()
    for name in arguments:
        if name in OURS:
            raise ValueError(f"trainer.{name} is decided by this program, not by the config")
        if name not in known:
            raise ValueError(f"trainer.{name} is not an argument of lightning.Trainer{did_you_mean(name, known)}")
    precision = arguments.get("precision", 32)
    if precision not in PRECISIONS:
        choices = ", ".join(str(choice) for choice in PRECISIONS[2:])
        raise ValueError(f"trainer.precision={precision} is not one of {choices}")
    for name in ("accumulate_grad_batches", "log_every_n_steps"):
        value = arguments.get(name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"trainer.{name} must be an integer of at least 1, got {value!r}")


def check_resume(config: Run, last: Path, resume: bool) -> None:
    """Raises `FileExistsError` without `resume`, and `ValueError` where `last` is not a training run's checkpoint or
    `config` changes what the run began with.

    The optimiser's state would go on as it was, and the records would tell of settings that were not used.
    """
    if not resume:
        raise FileExistsError(
            f"{config.run} has a run with the checkpoint {last.name}: --resume continues it, run= begins another"
        )
    before, now, usual = read_entries(last)["pbe"]["config"], to_dict(config), to_dict(type(config))
    changed = []
    for section in SECTIONS:
        # what the config of an older release lacks was as it is by default
        default, old, new = (flatten(values.get(section), section) for values in (usual, before, now))
        old = {**{key: x for key, x in default.items() if key in new}, **old}
        changed += [key for key in sorted({*old, *new}) if old.get(key) != new.get(key) and matters(key)]
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
    files = (".path", ".images", "encodings.folder", "model.init", "model.vae", "perceptual.network")
    costs = ("data.workers", "data.batch_size", "training.gradient_checkpointing", "training.compile")
    return not key.endswith((*files, *costs))


def flatten(value: Any, prefix: str) -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name, x in value.items() for key, leaf in flatten(x, f"{prefix}.{name}").items()}


def checkpoint_bytes(module: TrainingTask) -> int:
    """About how large a checkpoint is: what trains with what the optimizer keeps of it, and the rest of the state."""
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    rest = sum(x.nbytes for x in module.state_dict().values()) - trained
    copies = 1 + KINDS[module.optimizer_config.name].floats + (module.optimizer_config.name == "schedulefree")
    if isinstance(module, PaintByExampleTraining) and module.config.adapts:  # nothing else, and a file beside
        copies += 2 if module.model_ema else 1
        rest = 0
    return round(copies * trained + rest)


# ----------------------------------------------------------------------------------------------------------------------
# The parts


def open_data(config: Run) -> ExampleDataModule:
    """The run's data, set up for training."""
    data = ExampleDataModule(config.data)
    data.setup("fit")
    assert data.train is not None
    if len(data.train) < config.data.batch_size:
        records = f"{len(data.train)} records of {data.train.source.name}"
        raise ValueError(f"data.batch_size={config.data.batch_size} is more than the {records}")
    return data


def use_encodings(config: ModelRun, data: ExampleDataModule, module: TrainingTask, trainer: Trainer) -> None:
    """Has the data give encoded training examples, which are made where they are missing."""
    assert isinstance(module, PaintByExampleTraining)
    assert data.train is not None
    data.train = encoded(
        data.train,
        module.model.vae.to(trainer.strategy.root_device),
        config.encodings,
        config.data.batch_size,
        config.data.workers,
        trainer.precision_plugin.forward_context,
        makes=is_first_process(),
    )


def make_module(config: Run) -> TrainingTask:
    """The networks where training starts, and how they are trained."""
    about: dict[str, Any] = {
        "trained_on": f"{config.data.source.kind} {config.data.source.path}",
        "config": to_dict(config),
    }
    match config:
        case PaintByExampleRun() | DistillationRun():
            model = starting_model(config.model, config.seed)
            size = model.config
            exemplar_size = size.exemplar.vision.image_size
            check_sizes(config.data, size.vae.downsampling, exemplar_size, size.resolution, size.collage)
            if config.training.adapts and config.model.init != "scratch":
                base = find_checkpoint(config.model.init)
                about["base"] = {"checkpoint": base.name, "crc32": crc_of(base)}
            settings = (config.training, config.optimizer, about, config.seed)
            if isinstance(config, DistillationRun):
                return ConsistencyDistillation(model, config.distillation, *settings)
            return PaintByExampleTraining(model, *settings)
        case VAERun():
            if config.init == "scratch":
                vae = seeded(AutoencoderKL, config.size, config.seed)
            else:  # where the encoder trains, the latents are measured again
                vae = loaded_vae(config.init, latent_scale=1.0 if config.training.train == "all" else None)
            return VAETraining(vae, config.training, config.optimizer, about, *critics(config))
        case TinyDecoderRun():
            vae = loaded_vae(config.vae)
            decoder = seeded(TinyDecoder, config.training.size(vae.config), config.seed)
            return TinyDecoderTraining(decoder, vae, config.training, config.optimizer, about)


def critics(config: VAERun) -> tuple[LPIPS | None, PatchDiscriminator | None]:
    """The networks beside an autoencoder that are part of its loss. ValueError where pictures do not fit them."""
    perceptual, adversarial = config.training.perceptual, config.training.adversarial
    # in training mode, in which none of its layers differs: Lightning warns of others
    lpips = load_perceptual(perceptual.network).train() if perceptual else None
    sizes = DiscriminatorConfig(adversarial.channels, adversarial.num_layers) if adversarial else None
    discriminator = seeded(PatchDiscriminator, sizes, config.seed) if sizes else None
    side = config.data.recipe.resolution
    image = torch.zeros(1, 3, side, side)
    try:
        _ = lpips and lpips(image, image), discriminator and discriminator(image)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"training.perceptual or .adversarial: data.recipe.resolution={side}: {reason}") from None
    return lpips, discriminator


def make_trainer(config: Run, folder: Path, metrics: TrainingMetrics, stop: StopSignals) -> Trainer:
    """The run's trainer, with what happens beside the steps."""
    callbacks: list[Callback] = [metrics, Checkpoints(folder / "checkpoints", config.checkpoint, stop)]
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(StepsBar())
    if isinstance(config, ModelRun) and config.samples.every_n_steps:
        callbacks.append(SampleGrids(folder / "samples", config.samples))
    if config.early_stopping is not None:
        callbacks.append(Patience(config.early_stopping))
    arguments = {**config.trainer, "enable_progress_bar": False}  # Lightning's own
    if arguments.get("strategy") == "fsdp2":
        if not isinstance(config, ModelRun) or config.samples.every_n_steps:
            raise ValueError("trainer.strategy=fsdp2 is for training a UNet, with samples.every_n_steps=null")
        arguments["strategy"] = ShardedStrategy()
    shards = str(arguments.get("strategy", "")).startswith(("fsdp", "deepspeed"))  # which write files of their own
    try:
        return Trainer(
            **arguments,
            callbacks=callbacks,
            logger=make_loggers(config.log, folder, to_dict(config)),
            plugins=[] if shards else [AtomicCheckpointIO()],
            default_root_dir=folder,
            use_distributed_sampler=False,
        )
    except TypeError as error:  # how Lightning meets a text where it wants a number
        raise ValueError(f"lightning.Trainer does not take trainer={dict(config.trainer)}: {error}") from error
