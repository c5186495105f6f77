"""A run's settings: dataclasses filled from YAML files and dotted overrides. The only file that imports omegaconf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, TupleConfig
from omegaconf.errors import OmegaConfBaseException

from pbe.data import recipe_config
from pbe.data.datamodule import DataConfig
from pbe.data.recipe_config import OF_MODEL, of_model, override_recipe
from pbe.io.fields import Range, check, field_types
from pbe.models.vae import VAEConfig
from pbe.training.callbacks.checkpoints import CheckpointConfig
from pbe.training.callbacks.loggers import Log
from pbe.training.callbacks.samples import SamplesConfig
from pbe.training.distillation import DistillationConfig
from pbe.training.encodings import EncodingsConfig
from pbe.training.initialization import ModelConfig, known_size
from pbe.training.module import TrainingConfig
from pbe.training.optimizer import OptimizerConfig
from pbe.training.tiny_decoder import TinyDecoderConfig
from pbe.training.vae import VAETrainingConfig

# Settings that have another name now, of recipes too.
RENAMED = {
    "training.draws": "training.noise_draws",
    "samples.steps": "samples.edit.steps",
    "samples.guidance": "samples.edit.guidance",
    "samples.seed": "samples.edit.seed",
    **{f"data.recipe.{old}": f"data.recipe.{new}" for old, new in recipe_config.RENAMED.items()},
}


@dataclass
class RunConfig:
    """What every training run has."""

    run: str = "runs/run"
    """Its folder, for checkpoints, metrics and this config."""
    seed: int = 0
    """Of the initial weights; `data.seed` is that of everything else."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """Arguments of `lightning.Trainer`."""
    log: Log | None = None
    """Where metrics and sample grids go beside the run's folder; None: to TensorBoard where it is installed."""
    early_stopping: Annotated[int, Range(1)] | None = None
    """Validations in a row without a lower validation loss after which the run ends; None: it goes on."""

    def __post_init__(self) -> None:
        check("early_stopping", self.early_stopping, field_types(RunConfig)["early_stopping"])
        if self.early_stopping is not None and not self.has_validation:
            raise ValueError("early_stopping needs validation: set data.val_size or data.val_source")

    @property
    def has_validation(self) -> bool:
        return bool(self.data.val_size) or self.data.val_source is not None


@dataclass
class ModelRun(RunConfig):
    """Training networks of Paint by Example, to edit better or in fewer steps."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    encodings: EncodingsConfig = field(default_factory=EncodingsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples.every_n_steps and not self.has_validation and self.samples.edits is None:
            raise ValueError(
                "samples are made of validation pictures: set data.val_size or data.val_source, or samples.edits, "
                "or samples.every_n_steps=null"
            )
        if self.encodings.folder and self.data.recipe.fit == "buckets":
            raise ValueError("encodings.folder keeps one shape of example: set data.recipe.fit=squash or letterbox")
        if self.optimizer.name == "schedulefree" and self.training.ema_decay is not None:
            raise ValueError(
                f"training.ema_decay={self.training.ema_decay:g}: optimizer.name=schedulefree averages itself, "
                "set it to null"
            )


@dataclass
class PaintByExampleRun(ModelRun):
    """Training Paint by Example."""

    task: Literal["paint_by_example"] = "paint_by_example"


@dataclass
class DistillationRun(ModelRun):
    """Distilling Paint by Example into one that edits in a few steps."""

    task: Literal["distill"] = "distill"
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(train=["unet"], drop_exemplar=0.0, val_timesteps=[259, 499, 759, 999])
    )
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        training = self.training
        if training.train != ["unet"] and not training.lora:
            raise ValueError(f"training.train={training.train}: a student is [unet] or, with train=[], training.lora")
        if training.drop_exemplar or training.loss != "noise" or training.mask_weight != 1:
            raise ValueError(
                "distillation has a loss of its own and no exemplar is dropped: set training.loss=noise, mask_weight=1 "
                f"and drop_exemplar=0, got {training.loss}, {training.mask_weight:g} and {training.drop_exemplar:g}"
            )


@dataclass
class VAERun(RunConfig):
    """Training an autoencoder."""

    task: Literal["vae"] = "vae"
    init: str = "scratch"
    """A checkpoint whose autoencoder is where training starts, or "scratch"."""
    size: VAEConfig = field(default_factory=VAEConfig)
    """From scratch only: how large the autoencoder is."""
    training: VAETrainingConfig = field(default_factory=VAETrainingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_validation:
            raise ValueError("the latents' scale is measured on validation pictures: set data.val_size or .val_source")
        if self.init == "scratch" and self.training.train == "decoder":
            raise ValueError("training.train=decoder needs init=, a checkpoint whose encoder stays as it is")


@dataclass
class TinyDecoderRun(RunConfig):
    """Distilling a tiny decoder from an autoencoder."""

    task: Literal["tiny-decoder"] = "tiny-decoder"
    vae: str = MISSING
    """A checkpoint of the original layout, whose autoencoder's decoding is learned."""
    training: TinyDecoderConfig = field(default_factory=TinyDecoderConfig)


Run = PaintByExampleRun | VAERun | TinyDecoderRun | DistillationRun
TASKS: dict[str, type[Run]] = {
    "paint_by_example": PaintByExampleRun,
    "vae": VAERun,
    "tiny-decoder": TinyDecoderRun,
    "distill": DistillationRun,
}


def load_config(settings: Sequence[str]) -> Run:
    """The settings of YAML files and overrides such as `data.batch_size=8`; later ones win.

    A YAML file may name another in `base`, relative to itself, whose values it changes. `task` chooses the dataclass.
    The recipe's resolution, exemplar_size and collage, where none is given, are those of the model.
    Raises `FileNotFoundError`, or `ValueError` that names the key which is unknown or has a value of another type.
    """
    merged = OmegaConf.create()
    for setting in settings:
        changes = read_override(setting) if "=" in setting else read_yaml(Path(setting))
        check_names(changes, setting)
        merged = merge(merged, changes, setting)
    task = merged.get("task", "paint_by_example")
    if task not in TASKS:
        raise ValueError(f"task={task} is not one of {', '.join(TASKS)}")
    origin = " ".join(settings)
    try:
        open_sizes = [name for name in OF_MODEL if not has_value(merged, f"data.recipe.{name}")]
        config = cast(Run, OmegaConf.to_object(merge(OmegaConf.structured(TASKS[task]), merged, origin)))
    except OmegaConfBaseException as error:  # such as an interpolation that leads nowhere
        raise ValueError(f"{origin}: {explain(error)}") from None
    size = known_size(config.model) if isinstance(config, ModelRun) and open_sizes else None
    if size is not None:
        missing = {name: value for name, value in of_model(size).items() if name in open_sizes}
        config.data.recipe = override_recipe(config.data.recipe, missing, "data.recipe")
    return config


def has_value(config: DictConfig, key: str) -> bool:
    """Whether a setting has a value; null, which stands for none, is taken out."""
    if OmegaConf.select(config, key) is not None:
        return True
    parent, _, name = key.rpartition(".")
    if isinstance(section := OmegaConf.select(config, parent), DictConfig):
        section.pop(name, None)
    return False


def check_names(changes: DictConfig, origin: str) -> None:
    """ValueError for the old name of a setting that has another one now."""
    for old, new in RENAMED.items():
        node: Any = changes
        for part in old.split("."):
            node = node._get_node(part) if isinstance(node, DictConfig) else None
        if node is not None:
            raise ValueError(f"{origin}: {old} is now called {new}")


def read_yaml(path: Path) -> DictConfig:
    """A YAML file over what it names in `base`."""
    if not path.is_file():
        raise FileNotFoundError(f"config {path} not found; a setting is written key=value")
    try:
        config = OmegaConf.load(path)
    except OSError:
        raise
    except Exception as error:  # the YAML reader's own, of a package that only omegaconf needs
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} holds a list; expected settings, key: value")
    base = config.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: base must be the name of another config, got {base!r}")
    return config if base is None else merge(read_yaml(path.parent / base), config, str(path))


def read_override(setting: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([setting])
    except OmegaConfBaseException as error:
        raise ValueError(f"{setting}: {explain(error)}") from None
    except Exception as error:  # the YAML reader's own
        raise ValueError(f"{setting} cannot be read: {' '.join(str(error).split())}") from None


def merge(config: DictConfig, changes: DictConfig, origin: str) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(config, changes))
    except (OmegaConfBaseException, ValueError, TypeError) as error:  # TypeError: settings where a list is wanted
        raise ValueError(f"{origin}: {explain(error)}") from None


def explain(error: Exception) -> str:
    """omegaconf's message on one line, with the whole key; its own words, where a list is wanted, name types."""
    first, *_ = str(error).splitlines()
    key = getattr(error, "full_key", None)
    if isinstance(getattr(error, "child_node", None), (ListConfig, TupleConfig)):
        return f"{key} is a list, written [a, b]; got {getattr(error, 'value', None)}"
    return f"{key}: {first}" if key else first


def to_dict(config: Run | type[Run]) -> dict[str, Any]:
    """The settings as plain containers; of a class, the defaults."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def save_config(config: Run, path: Path) -> None:
    """Writes all settings, defaults too, as a YAML file that `load_config` reads."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")
