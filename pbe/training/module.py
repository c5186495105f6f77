"""Training Paint by Example: the step and the validation loss (arXiv 2211.13227, section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from pbe.checkpoints.infer_config import pbe_entry
from pbe.data.example import Example
from pbe.models.lora import LoRAConfig, add_lora, is_adapter
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig, latent_mask
from pbe.models.unet import TransformerBlock
from pbe.sampling import NoiseSchedule
from pbe.training.draws import Batch, make_draws
from pbe.training.ema import ParameterAverage, average_name
from pbe.training.initialization import PARTS, Part, check_parts
from pbe.training.memory import checkpoint_blocks, halve_frozen, keep_norms_half, skip_queries
from pbe.training.optimizer import OptimizerConfig, make_optimizer

NUM_BANDS = 4  # of timesteps, whose losses are logged apart: they differ by orders of magnitude

# The autoencoder takes more memory a picture than the UNet that trains; so many pixels keep any device busy.
ENCODED_PIXELS = 8 * 512**2

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainingConfig:
    """How Paint by Example is trained; the defaults are the paper's recipe.

    train: the parts that learn.
    lora: adapters on the UNet's attention learn, and nothing else: `train` is then empty. Checkpoints hold the adapters
        alone, for `pbe.checkpoints.adapters.load_lora` and `pbe checkpoint merge-lora`.
    draws: how many timesteps, each with its noise, the UNet sees of each picture of a batch, which is encoded once:
        more of its samples in a given time, and more memory, where the encoders are a large part of a step.
    drop_exemplar: the probability with which the learned null context stands in for the exemplar's, so that guidance
        has an unconditional prediction; drawn for each sample, or as in the original for a whole batch.
    ema_decay: of the parameters' moving average; None: no average.
    loss: whose squared error is minimised: that of the predicted "noise", as in the paper, or that of the "velocity"
        sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 it implies (Salimans and Ho 2022, arXiv 2202.00512, section 4),
        which is the noise's over alpha_bar: it gives the noisiest timesteps, where form and colour are decided, as
        much to say as the others, and lets a small model learn them sooner.
    gradient_checkpointing: compute the UNet's activations again in the backward pass: more time, far less memory. A
        number: those of so many levels of highest resolution alone, which take the most memory.
    frozen: the precision of what does not learn: of the autoencoder, of CLIP, and where adapters learn of the layers
        beneath them, which needs trainer.precision of the same kind. Checkpoints hold the values that it had. None: as
        the rest.
    norms: under mixed precision on CUDA, "half" makes the UNet's norms return half precision, not float32: less memory
        and time. None: as autocast has it.
    val_timesteps: where the validation loss is measured.
    """

    train: list[Part] = field(default_factory=lambda: ["unet", "mapper", "final_ln", "proj_out", "null_context"])
    lora: LoRAConfig | None = None
    draws: int = 1
    drop_exemplar: float = 0.2
    drop_exemplar_by: Literal["sample", "batch"] = "sample"
    ema_decay: float | None = None
    loss: Literal["noise", "velocity"] = "noise"
    gradient_checkpointing: bool | int = False
    frozen: Literal["bfloat16", "float16"] | None = None
    norms: Literal["half"] | None = None
    compile: bool = False
    channels_last: bool = False
    val_timesteps: list[int] = field(default_factory=lambda: [100, 300, 500, 700, 900])

    def __post_init__(self) -> None:
        if self.lora and (self.train or self.ema_decay is not None):
            raise ValueError("training.lora trains adapters alone, without averages: set train=[] and ema_decay=null")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"training.ema_decay must be between 0 and 1, or null for none, got {self.ema_decay}")
        if not self.train and not self.lora:
            raise ValueError(f"training.train is empty; it lists parts to train, of {', '.join(PARTS)}")
        check_parts("training.train", self.train)
        if self.draws < 1:
            raise ValueError(f"training.draws must be at least 1, got {self.draws}")
        if not 0 <= self.drop_exemplar <= 1:
            raise ValueError(f"training.drop_exemplar is a probability, got {self.drop_exemplar}")
        if self.drop_exemplar_by not in ("sample", "batch"):
            raise ValueError(f"training.drop_exemplar_by must be sample or batch, got {self.drop_exemplar_by!r}")
        if self.loss not in ("noise", "velocity"):
            raise ValueError(f"training.loss must be noise or velocity, got {self.loss!r}")
        if self.gradient_checkpointing < 0:
            raise ValueError(
                "training.gradient_checkpointing must be true, false or a number of levels, got "
                f"{self.gradient_checkpointing}"
            )
        if self.frozen not in (None, *HALF):
            raise ValueError(f"training.frozen must be {', '.join(HALF)} or null, got {self.frozen!r}")
        if self.norms not in (None, "half"):
            raise ValueError(f"training.norms must be half or null, got {self.norms!r}")
        if not self.val_timesteps or not all(0 <= t < 1000 for t in self.val_timesteps):
            raise ValueError(f"training.val_timesteps must be timesteps from 0 to 999, got {self.val_timesteps}")


# ----------------------------------------------------------------------------------------------------------------------
# What trains


def trained_names(model: PaintByExample, parts: Sequence[Part]) -> set[str]:
    """The names of the parameters of these parts that a gradient can reach."""
    prefixes = tuple(PARTS[part] for part in parts)
    names = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    if context_length(model.config) > 1:
        return names
    return names - {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, TransformerBlock)
        for name, _ in module.named_parameters()
        # The softmax over a single token is 1, whatever query and key are.
        if name.startswith(("norm2.", "attn2.to_q.", "attn2.to_k."))
    }


def context_length(config: PaintByExampleConfig) -> int:
    """How many tokens the exemplar's context has."""
    exemplar = config.exemplar
    return 1 if exemplar.tokens == "class" else exemplar.vision.num_positions


# ----------------------------------------------------------------------------------------------------------------------
# The task


class PaintByExampleTraining(lightning.LightningModule):
    """Trains the parts of `model` that `config.train` names, on batches of `Example`.

    Its checkpoints have the original keys at the top of `state_dict`, averages as `model_ema.…`, and an entry `pbe`
    with what shapes cannot tell and `about`: `pbe.load_model` reads them. Adapters start from values drawn with `seed`.

    Raises `FloatingPointError` in the step whose loss is not finite, naming the batch's files.
    """

    def __init__(
        self,
        model: PaintByExample,
        config: TrainingConfig,
        optimizer: OptimizerConfig,
        about: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.config, self.optimizer_config, self.about = model, config, optimizer, dict(about or {})
        self.schedule = NoiseSchedule.scaled_linear()
        trained = trained_names(model, config.train)
        if config.lora:
            add_lora(model, config.lora, torch.Generator().manual_seed(seed))
            trained = {name for name, _ in model.named_parameters() if is_adapter(name)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model_ema = None
        if config.ema_decay is not None:
            parameters = {name: parameter for name, parameter in model.named_parameters() if name in trained}
            self.model_ema = ParameterAverage(parameters, config.ema_decay)
        # Adapters alone are saved: what they lie over can be read again from where it came.
        originals = halve_frozen(model, HALF[config.frozen], layers=bool(config.lora)) if config.frozen else {}
        self.originals = {} if config.lora else originals
        if config.norms == "half":
            keep_norms_half(model.unet)
        if context_length(model.config) == 1:
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
        precision = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}.get(self.config.frozen)
        if self.config.lora and precision and self.trainer.precision != precision:
            raise ValueError(
                f"training.frozen={self.config.frozen} beneath adapters needs trainer.precision={precision}, "
                f"got {self.trainer.precision}"
            )

    def configure_optimizers(self) -> dict[str, Any]:
        return make_optimizer(self, self.optimizer_config)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.model_ema:
            self.model_ema.update(self.global_step + 1)

    # --- the step -----------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Example, dataloader_idx: int) -> Batch:
        # Here the seeds are still on the CPU, where reading them keeps no device waiting.
        H, W = batch.image.shape[-2:]
        vae = self.model.config.vae
        latent_shape = (vae.latent_channels, -(-H // vae.downsampling), -(-W // vae.downsampling))
        count = self.config.draws if self.training else 1
        return Batch(batch, make_draws(batch.seed.tolist(), latent_shape, self.schedule.num_timesteps, count))

    @torch.no_grad()
    def encode(self, example: Example, posterior_noise: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled latents z_0 and z_masked, float32 (B, 4, h, w) each, of one batch for the autoencoder."""
        pictures = torch.cat([example.image, example.masked_image])  # (2B, 3, H, W)
        noise = posterior_noise.transpose(0, 1).flatten(0, 1)  # (2B, 4, h, w)
        at_once = max(1, ENCODED_PIXELS // (pictures.shape[-2] * pictures.shape[-1]))
        slices = zip(pictures.split(at_once), noise.split(at_once), strict=True)
        z = torch.cat([self.model.vae.encode(x).sample(noise) for x, noise in slices])
        return z.float().chunk(2)

    def drop_exemplars(self, context: Tensor, u: Tensor) -> Tensor:
        """The context (B, T, C) with the null context where the uniform draw `u` (B,) is below the probability."""
        if self.config.drop_exemplar_by == "batch":
            u = u[:1].expand_as(u)
        dropped = (u < self.config.drop_exemplar)[:, None, None]
        return torch.where(dropped, self.model.null_context.to(context), context)

    def losses(self, z_0: Tensor, z_masked: Tensor, mask: Tensor, context: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Each sample's mean squared error (B,) of the predicted noise; `mask` is at latent size."""
        z_t = self.schedule.add_noise(z_0, noise, t)
        if self.model.config.unet.in_channels == z_t.shape[1]:
            unet_in = z_t  # a prior without the task's inputs, which `expand` adds
        else:
            unet_in = torch.cat([z_t, z_masked, mask], dim=1)  # (B, 9, h, w)
        eps = self.model.unet(unet_in, t, context)
        return (eps.float() - noise).square().flatten(1).mean(dim=1)

    def batch_losses(self, batch: Batch) -> Tensor:
        """Each draw's mean squared error (K B,) of the predicted noise, from pictures on."""
        example, draws = batch
        z_0, z_masked = self.encode(example, draws.posterior_noise)
        mask = latent_mask(example.mask, self.model.config.vae.downsampling)
        context = self.model.encode_exemplar(example.exemplar)
        K = len(draws.t) // len(z_0)
        z_0, z_masked, mask = (x.repeat(K, 1, 1, 1) for x in (z_0, z_masked, mask))
        context = self.drop_exemplars(context.repeat(K, 1, 1), draws.drop)
        return self.losses(z_0, z_masked, mask, context, draws.t, draws.noise)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        example, draws = batch
        losses = self.batch_losses(batch)
        loss = (losses * self.weights(draws.t)).mean()
        check_finite(loss, self.global_step + 1, example.file)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        losses = losses.detach()
        by_picture = losses.view(-1, len(example.image)).mean(dim=0)
        return {"loss": loss, "metrics": {"loss": by_picture, **self.by_band(losses, draws.t)}}

    def weights(self, t: Tensor) -> Tensor:
        """What the squared error of the noise at each timestep (B,) is multiplied by."""
        if self.config.loss == "noise":
            return torch.ones_like(t, dtype=torch.float32)
        return (1 / self.schedule.alpha_bar).float().to(t.device, non_blocking=t.is_cuda)[t]

    def by_band(self, losses: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The losses (B,) by bands of timesteps, NaN where a sample is in another band."""
        T = self.schedule.num_timesteps
        edges = [T * i // NUM_BANDS for i in range(NUM_BANDS + 1)]
        # not `losses[in_band]`, whose length a GPU would have to be asked for
        return {
            f"loss_t{a:03}-{b - 1:03}": losses.where((t >= a) & (t < b), math.nan) for a, b in itertools.pairwise(edges)
        }

    # --- validation and test ------------------------------------------------------------------------------
    # The same noise at the same timesteps each time, so that a difference is the model's; the averages, where there
    # are any, since they are what is used in the end.

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averages in the parameters' place, where there are any."""
        if self.model_ema:
            self.model_ema.swap()
        try:
            yield
        finally:
            if self.model_ema:
                self.model_ema.swap()

    def on_validation_epoch_start(self) -> None:
        self.val_losses: list[Tensor] = []  # (B, K) each, at the K timesteps
        self.val_pairs: list[Tensor] = []  # (B, 2) each, with the right and with a wrong exemplar
        self.last_context: Tensor | None = None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self.averaged():
            self.compare_exemplars(batch)

    def compare_exemplars(self, batch: Batch) -> None:
        """Losses of a validation batch with the right exemplars and with wrong ones."""
        example, draws = batch
        z_0, z_masked = self.encode(example, draws.posterior_noise)
        mask = latent_mask(example.mask, self.model.config.vae.downsampling)
        context = self.model.encode_exemplar(example.exemplar)

        def losses(context: Tensor) -> Tensor:
            at = [torch.full_like(draws.t, t) for t in self.config.val_timesteps]
            return torch.stack([self.losses(z_0, z_masked, mask, context, t, draws.noise) for t in at], dim=1)

        right = losses(context)
        self.val_losses.append(right)
        # The wrong exemplar is that of the sample before; a first sample that is alone has none.
        if self.last_context is not None or len(context) > 1:
            before = context[-1:] if self.last_context is None else self.last_context
            wrong = losses(torch.cat([before, context[:-1]]))
            self.val_pairs.append(torch.stack([right.mean(dim=1), wrong.mean(dim=1)], dim=1))
        self.last_context = context[-1:]

    def on_validation_epoch_end(self) -> None:
        log_validation(self, self.compared("val"))

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        log_validation(self, self.compared("test"))

    def compared(self, split: str) -> dict[str, float]:
        """What `compare_exemplars` found, over all processes."""
        losses = torch.cat(self.val_losses).cpu().double()  # in this order: MPS has no float64
        pairs = torch.cat([*self.val_pairs, self.val_losses[0].new_empty(0, 2)]).cpu().double()
        gain = pairs[:, 1] - pairs[:, 0]
        counts = torch.tensor([len(losses), len(pairs)]).double()
        sums = torch.cat([losses.sum(dim=0), pairs.sum(dim=0), gain.square().sum()[None], counts])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()
        *at_timesteps, right, wrong, squares, n, pairs_n = sums.tolist()

        metrics = {f"{split}/loss_t{t:03}": x / n for t, x in zip(self.config.val_timesteps, at_timesteps, strict=True)}
        metrics[f"{split}/loss"] = sum(metrics.values()) / len(metrics)
        if pairs_n > 1:
            gain = (wrong - right) / pairs_n
            variance = max(squares / pairs_n - gain**2, 0.0) * pairs_n / (pairs_n - 1)
            metrics[f"{split}/loss_wrong_exemplar"] = wrong / pairs_n
            metrics[f"{split}/exemplar_gain"] = gain  # how much worse a wrong exemplar is, and its standard error
            metrics[f"{split}/exemplar_gain_se"] = (variance / pairs_n) ** 0.5
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # contiguous: channels-last is this run's choice, not the file's
        state = {name.removeprefix("model."): x.contiguous() for name, x in checkpoint["state_dict"].items()}
        state |= {name: x.contiguous() for name, x in self.originals.items()}
        if self.model_ema:  # the convention is an average for every parameter of the UNet
            unet = [name for name in state if name.startswith(PARTS["unet"])]
            state = {**{f"model_ema.{average_name(name)}": state[name] for name in unet}, **state}
        checkpoint["pbe"] = {**pbe_entry(self.model.config), **self.about}
        if self.config.lora:  # the rest is as in the checkpoint that training started from
            state = {name: x for name, x in state.items() if is_adapter(name)}
            checkpoint["pbe"]["lora"] = asdict(self.config.lora)
        checkpoint["state_dict"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["state_dict"]
        if bool(self.model_ema) != any(name.startswith("model_ema.") for name in saved):
            raise ValueError(
                "the checkpoint was made with another training.ema_decay: averages can be neither begun nor dropped "
                "in the middle of a run"
            )
        own = self.state_dict()
        if self.config.lora:
            saved = {name.removeprefix("model."): x for name, x in own.items() if not is_adapter(name)} | saved
        missing = [name for name in own if name.removeprefix("model.") not in saved]
        if missing:
            raise ValueError(f"the checkpoint is of another model: it lacks {len(missing)} tensors, as {missing[0]}")
        self.originals = {name: saved[name] for name in self.originals}
        checkpoint["state_dict"] = {name: saved[name.removeprefix("model.")] for name in own}


def check_finite(loss: Tensor, step: int, files: Sequence[str]) -> None:
    """Raises `FloatingPointError` that names the step and the batch's files."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} in step {step}, on {', '.join(files)}")


def log_validation(module: lightning.LightningModule, metrics: Mapping[str, float]) -> None:
    """Logs metrics at the number of optimiser steps taken, which in validation Lightning would count one less."""
    # sync_dist: all processes have the same values, and Lightning warns where it is not told
    module.log_dict({**metrics, "step": float(module.global_step)}, sync_dist=True)
