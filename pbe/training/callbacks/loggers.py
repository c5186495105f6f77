"""Where a run's metrics and sample grids go beside its own file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from torchvision.transforms.v2 import functional as T

from pbe.training.callbacks.metrics import JSONLinesLogger

Log = Literal["tensorboard", "wandb", "csv", "none"]


def make_loggers(log: Log | None, folder: Path, config: Mapping[str, Any]) -> list[Logger]:
    """The run's own file, and the logger by name; `config` is what wandb shows of a run.

    ImportError where its package is missing.
    """
    chosen = log or ("tensorboard" if find_spec("tensorboard") else "none")
    if chosen in ("tensorboard", "wandb") and not find_spec(chosen):
        extra = "log" if chosen == "tensorboard" else chosen
        raise ImportError(f"log={chosen} needs {chosen}, the extra {extra}: pip install pbe[{extra}]")
    loggers: list[Logger] = [JSONLinesLogger(folder / "metrics.jsonl")]
    match chosen:
        case "tensorboard":
            loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        case "csv":
            loggers.append(CSVLogger(folder, name="csv"))  # version_0, then 1, …: it never adds to a file
        case "wandb":
            # a run that goes on is the same run there
            name = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
            project = os.environ.get("WANDB_PROJECT", "pbe")
            loggers.append(WandbLogger(folder.name, folder, id=name, project=project, config=config, resume="allow"))
    return loggers


def log_picture(trainer: Trainer, name: str, picture: Image.Image) -> None:
    """Gives a picture to the loggers that show pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, T.pil_to_tensor(picture), trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], trainer.global_step)
