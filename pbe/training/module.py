"""Training Paint by Example with Lightning: the step and the validation loss (arXiv 2211.13227, section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from pbe.checkpoints.adapter_writing import write_adapter
from pbe.checkpoints.adapters import read_adapter
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.key_map import average_name
from pbe.checkpoints.writing import save_checkpoint
from pbe.data.example import EncodedExample, Example
from pbe.io.atomic import warn_once
from pbe.io.fields import Range, check_fields
from pbe.models.detail import sizes
from pbe.models.lora import LoRAConfig, add_lora
from pbe.models.paint_by_example import TIMESTEPS, PaintByExample
from pbe.sampling import NoiseSchedule
from pbe.training.detail import DetailTrainingConfig, start_detail
from pbe.training.draws import TrainingBatch, add_noise_draws
from pbe.training.ema import ParameterAverage
from pbe.training.initialization import PARTS, Part, is_trained_adapter, trained_names
from pbe.training.loss import Loss, denoising_losses, encode, loss_weights, training_losses
from pbe.training.memory import cast_frozen, checkpoint_blocks, keep_norms_half, skip_queries
from pbe.training.optimizer import OptimizerConfig
from pbe.training.sharding import shard
from pbe.training.task import TrainingTask, beside, sum_over_processes

NUM_BANDS = 4  # of timesteps, whose losses are logged apart: they differ by orders of magnitude

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainingConfig:
    """How Paint by Example is trained; the defaults are the paper's recipe."""

    train: list[Part] = field(default_factory=lambda: ["unet", "mapper", "final_ln", "proj_out", "null_context"])
    """The parts that learn."""
    lora: LoRAConfig | None = None
    """Adapters of the UNet's layers learn, and nothing else: `train` is then empty. Checkpoints hold the adapters
    alone, and beside each lies a .safetensors file of them that others read too."""
    detail: DetailTrainingConfig | None = None
    """As `lora`, of a detail adapter: `{tokens: 16, layers: 4, width: 768, drop: 0.1, drop_tokens: 0.1}`."""
    noise_draws: Annotated[int, Range(1)] = 1
    """How many timesteps, each with its noise, the UNet sees of each picture of a batch, which is encoded once: more of
    its samples in a given time, and more memory, where the encoders are a large part of a step."""
    drop_exemplar: Annotated[float, Range(0, 1)] = 0.2
    """The probability with which the learned null context takes the place of the exemplar's, so that guidance has an
    unconditional prediction."""
    drop_exemplar_by: Literal["sample", "batch"] = "sample"
    """Whether that is drawn for each sample, or as in the original for a whole batch."""
    ema_decay: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    """Of the parameters' moving average; None: no average."""
    loss: Loss = "noise"
    """Whose squared error is minimised: that of the predicted noise, as in the paper; or that of the velocity which it
    implies, the noise's over alpha_bar: it gives the noisiest timesteps, where form and colour are decided, as much to
    say as the others, and lets a small model learn them sooner; or min_snr, the noise's with less weight where little
    noise is left (gamma 5), so that those timesteps do not pull against the others."""
    mask_weight: Annotated[float, Range(0, above=True)] = 1.0
    """Weight in the loss of the part to repaint, against 1 of the rest."""
    gradient_checkpointing: Annotated[bool | int, Range(0), "true, false or a number of levels"] = False
    """Compute the UNet's activations again in the backward pass: more time, far less memory. A number: those of this
    many levels of highest resolution alone, which take the most memory."""
    frozen: Literal["bfloat16", "float16"] | None = None
    """The precision of what does not learn: of the autoencoder, of CLIP, and where adapters learn of the layers beneath
    them, which needs trainer.precision of the same kind. Checkpoints hold the values that it had. None: as the rest."""
    norms: Literal["half"] | None = None
    """Under mixed precision on CUDA, "half" makes the UNet's norms return half precision, not float32: less memory and
    time. None: as autocast has it."""
    compile: bool = False
    """Compile the UNet with `torch.compile`."""
    channels_last: bool = False
    """Lay convolutions' values out with the channels last."""
    val_timesteps: Annotated[
        list[Annotated[int, Range(0, 999)]], Range(1), "a list of timesteps from 0 to 999, at least one"
    ] = field(default_factory=lambda: [100, 300, 500, 700, 900])
    """Where the validation loss is measured; with `model.collage`, which has fewer, in proportion."""

    def __post_init__(self) -> None:
        check_fields(self, "training")
        if self.lora and self.detail:
            raise ValueError("training.lora and training.detail train adapters alone: choose one, and then the other")
        if self.adapts and self.train:
            kind = "lora" if self.lora else "detail"
            raise ValueError(f"training.{kind} trains adapters alone: set training.train=[], got {self.train}")
        if not self.train and not self.adapts:
            raise ValueError(f"training.train is empty; it lists parts to train, of {', '.join(PARTS)}")

    @property
    def adapts(self) -> bool:
        """Whether adapters learn, and nothing else."""
        return bool(self.lora or self.detail)


# ----------------------------------------------------------------------------------------------------------------------
# The task


class PaintByExampleTraining(TrainingTask):
    """Trains the parts of `model` that `config.train` names, on batches of `Example`.

    Its checkpoints have the original keys at the top of `state_dict`, averages as `model_ema.…`, and an entry `pbe`
    with what shapes cannot tell and `about`: `pbe.load_model` reads them. Adapters start from values drawn with `seed`.
    """

    def __init__(
        self,
        model: PaintByExample,
        config: TrainingConfig,
        optimizer: OptimizerConfig,
        about: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__(optimizer, about)
        self.model, self.config = model, config
        T = model.config.num_timesteps
        self.schedule = NoiseSchedule.scaled_linear().first(T)
        self.val_timesteps = [t * T // TIMESTEPS for t in config.val_timesteps]
        trained = trained_names(model, config.train)
        if config.lora:
            add_lora(model, config.lora, torch.Generator().manual_seed(seed))
        if config.detail:
            start_detail(model, config.detail, seed)
        if config.adapts:
            trained = {name for name, _ in model.named_parameters() if is_trained_adapter(name)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model_ema = None
        if config.ema_decay is not None:
            parameters = {name: parameter for name, parameter in model.named_parameters() if name in trained}
            self.model_ema = ParameterAverage(parameters, config.ema_decay)
        # Adapters alone are saved: what they lie over can be read again from where it came.
        originals = cast_frozen(model, HALF[config.frozen], layers=config.adapts) if config.frozen else {}
        self.originals = {} if config.adapts else originals
        if config.norms == "half":
            keep_norms_half(model.unet)
        if model.config.exemplar.num_tokens == 1 and not config.detail:  # which has use for the queries
            skip_queries(model.unet)
        if config.gradient_checkpointing:
            checkpoint_blocks(model.unet, config.gradient_checkpointing)
        if config.compile:
            model.unet.compile()

    def setup(self, stage: str) -> None:
        whole = isinstance(self.trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        for setting in ("ema_decay", "frozen"):
            if getattr(self.config, setting) is not None and not whole:
                raise ValueError(
                    f"training.{setting} needs whole parameters in every process, which the strategy "
                    f"{type(self.trainer.strategy).__name__} divides: use ddp, or {setting}=null"
                )
        if self.optimizer_config.name != "adamw" and not whole:
            raise ValueError(f"optimizer.name={self.optimizer_config.name} needs whole parameters: use ddp, or adamw")
        if self.config.adapts and self.config.frozen:
            precision = "bf16-mixed" if self.config.frozen == "bfloat16" else "16-mixed"
            if self.trainer.precision != precision:
                raise ValueError(
                    f"training.frozen={self.config.frozen} beneath adapters needs trainer.precision={precision}, "
                    f"got {self.trainer.precision}"
                )

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # of `ShardedStrategy`
            shard(self, self.model.unet, self.device_mesh["data_parallel"], ("batch_losses", "compare_exemplars"))

    # --- the step -----------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Example | EncodedExample, dataloader_idx: int) -> TrainingBatch:
        # Here the seeds are still on the CPU, where reading them keeps no device waiting.
        count = self.config.noise_draws if self.training else 1
        tokens = self.config.detail.tokens if self.config.detail else 0
        return add_noise_draws(batch, self.model.config.vae, self.schedule.num_timesteps, count, tokens)

    def batch_losses(self, batch: TrainingBatch) -> Tensor:
        """Each draw's mean squared error (K B,) of the predicted noise."""
        config = self.config
        drop = config.drop_exemplar, config.drop_exemplar_by
        return training_losses(self.model, self.schedule, batch, *drop, config.mask_weight, config.detail)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> dict[str, Any]:
        example, draws = batch
        losses = self.batch_losses(batch)
        loss = (losses * loss_weights(self.schedule, draws.t, self.config.loss)).mean()
        losses = losses.detach()
        by_picture = losses.view(-1, len(example.seed)).mean(dim=0)
        return self.step_result(loss, example.file, {"loss": by_picture, **self.by_band(losses, draws.t)})

    def by_band(self, losses: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The losses (B,) by bands of timesteps, NaN where a sample is in another band."""
        T = self.schedule.num_timesteps
        edges = [T * i // NUM_BANDS for i in range(NUM_BANDS + 1)]
        # not `losses[in_band]`, whose length a GPU would have to be asked for
        return {
            f"loss_t{a:03}-{b - 1:03}": losses.where((t >= a) & (t < b), math.nan) for a, b in itertools.pairwise(edges)
        }

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.model_ema:
            self.model_ema.update(self.global_step + 1)

    # --- validation and test ------------------------------------------------------------------------------
    # The same noise at the same timesteps each time, so that a difference is the model's; the averages, where there
    # are any, since they are what is used in the end.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages in the parameters' place, where there are any."""
        if self.model_ema:
            self.model_ema.swap()
        try:
            with super().averaged():
                yield
        finally:
            if self.model_ema:
                self.model_ema.swap()

    def on_validation_epoch_start(self) -> None:
        self.val_losses: list[Tensor] = []  # (B, K) each, at the K timesteps
        self.val_pairs: list[Tensor] = []  # (B, 2) each, with the right and with a wrong exemplar
        self.last_context: Tensor | None = None

    def validation_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        with self.averaged():
            self.compare_exemplars(batch)

    def compare_exemplars(self, batch: TrainingBatch) -> None:
        """Losses of a validation batch with the right exemplars and with wrong ones."""
        example, draws = batch
        z_0, condition = encode(self.model, example, draws.posterior_noise)

        def losses(context: Tensor) -> Tensor:
            at = [torch.full_like(draws.t, t) for t in self.val_timesteps]
            given = self.model, self.schedule, z_0, condition._replace(context=context)
            return torch.stack([denoising_losses(*given, t, draws.noise) for t in at], dim=1)

        context = condition.context
        right = losses(context)
        self.val_losses.append(right)
        # The wrong exemplar is that of the sample before; a first sample that is alone has none.
        if self.last_context is not None or len(context) > 1:
            before = context[-1:] if self.last_context is None else self.last_context
            wrong = losses(torch.cat([before, context[:-1]]))
            self.val_pairs.append(torch.stack([right.mean(dim=1), wrong.mean(dim=1)], dim=1))
        self.last_context = context[-1:]

    def on_validation_epoch_end(self) -> None:
        self.log_validation(self.compared("val"))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        self.log_validation(self.compared("test"))

    def compared(self, split: str) -> dict[str, float]:
        """What `compare_exemplars` found, over all processes."""
        losses = torch.cat(self.val_losses).cpu().double()  # in this order: MPS has no float64
        pairs = torch.cat([*self.val_pairs, self.val_losses[0].new_empty(0, 2)]).cpu().double()
        gain = pairs[:, 1] - pairs[:, 0]
        counts = torch.tensor([len(losses), len(pairs)]).double()
        sums = torch.cat([losses.sum(dim=0), pairs.sum(dim=0), gain.square().sum()[None], counts])
        *at_timesteps, right, wrong, squares, n, pairs_n = sum_over_processes(self.trainer, sums).tolist()

        metrics = {f"{split}/loss_t{t:03}": x / n for t, x in zip(self.val_timesteps, at_timesteps, strict=True)}
        metrics[f"{split}/loss"] = sum(metrics.values()) / len(metrics)
        if pairs_n > 1:
            gain = (wrong - right) / pairs_n
            variance = max(squares / pairs_n - gain**2, 0.0) * pairs_n / (pairs_n - 1)
            metrics[f"{split}/loss_wrong_exemplar"] = wrong / pairs_n
            metrics[f"{split}/exemplar_gain"] = gain  # how much worse a wrong exemplar is, and its standard error
            metrics[f"{split}/exemplar_gain_se"] = (variance / pairs_n) ** 0.5
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------

    def write_beside(self, checkpoint: Path) -> None:
        """The adapters, LoRA in the names that diffusers and PEFT read; their averages, where there are any."""
        if not self.config.adapts or not checkpoint.is_file():  # strategies that divide parameters make folders
            return
        if not find_spec("safetensors"):
            warn_once("only checkpoints of the adapters are written; a file for others needs the extra safetensors")
            return
        read = read_adapter(checkpoint, self.model)
        entry = {**pbe_entry(self.model.config), **{name: x for name, x in self.about.items() if name == "base"}}
        if read.detail:
            config, tensors = read.detail
            save_checkpoint(tensors, beside(checkpoint), {**entry, "detail": sizes(config)}, overwrite=True)
            return
        # scaled already: many readers take alpha to be the rank
        updates = {name: update.scaled() for name, update in read.updates.items()}
        adapter = replace(read, updates=updates, metadata={"pbe": entry})
        write_adapter(adapter, beside(checkpoint), "diffusers", model=self.model, overwrite=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # contiguous: channels-last is this run's choice, not the file's
        state = {name.removeprefix("model."): x.contiguous() for name, x in checkpoint["state_dict"].items()}
        state |= {name: x.contiguous() for name, x in self.originals.items()}
        checkpoint["pbe"] = {**pbe_entry(self.model.config), **self.about}
        if self.config.adapts:  # the rest is as in the checkpoint that training started from
            state = {name: x for name, x in state.items() if is_trained_adapter(name)}
            lora, detail = self.config.lora, self.config.detail
            checkpoint["pbe"] |= {"lora": asdict(lora)} if lora else {"detail": sizes(detail)} if detail else {}
        elif self.model_ema:  # the convention is an average for every parameter of the UNet
            unet = [name for name in state if name.startswith(PARTS["unet"])]
            state = {**{average_name(name): state[name] for name in unet}, **state}
        checkpoint["state_dict"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["state_dict"]
        if bool(self.model_ema) != any(name.startswith("model_ema.") for name in saved):
            raise ValueError(
                "the checkpoint was made with another training.ema_decay: averages can be neither begun nor dropped "
                "in the middle of a run"
            )
        own = self.state_dict()
        if self.config.adapts:
            ours = {name.removeprefix("model."): x for name, x in own.items()}
            saved = {name: x for name, x in ours.items() if not is_trained_adapter(name)} | saved
        missing = [name for name in own if name.removeprefix("model.") not in saved]
        if missing:
            raise ValueError(f"the checkpoint is of another model: it lacks {len(missing)} tensors, as {missing[0]}")
        self.originals = {name: saved[name] for name in self.originals}
        checkpoint["state_dict"] = {name: saved[name.removeprefix("model.")] for name in own}
