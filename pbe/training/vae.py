"""Training a small autoencoder for small models: reconstruction and a slight pull to the normal distribution."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.data.example import Example
from pbe.io.fields import Range, check_fields
from pbe.models.vae import AutoencoderKL
from pbe.sampling import randn
from pbe.training.draws import latent_shape
from pbe.training.optimizer import OptimizerConfig
from pbe.training.task import TrainingTask, data_of, sum_over_processes


@dataclass
class VAETrainingConfig:
    """How an autoencoder is trained."""

    train: Literal["all", "decoder"] = "all"
    """All of it, or the decoder alone: the latents stay what they are, and a model trained on them can take the decoder
    over (`pbe checkpoint set-vae`)."""
    kl_weight: Annotated[float, Range(0)] = 1e-4
    """Of the Kullback-Leibler divergence, a mean over latent values, against the mean absolute error."""

    compile: bool = False
    """Compile encoder and decoder with `torch.compile`."""

    def __post_init__(self) -> None:
        check_fields(self, "training")


class DecodingTask(TrainingTask):
    """Trains what decodes an autoencoder's latents, on the images of batches of `Example`.

    The loss is the sum of the pictures' `errors`, weighted by `weights` of the same names.
    """

    val_loss = "val/l1"
    weights: dict[str, float]

    def __init__(self, vae: AutoencoderKL, optimizer: OptimizerConfig, about: Mapping[str, Any] | None = None):
        super().__init__(optimizer, about)
        self.vae = vae

    @abstractmethod
    def errors(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Each picture's errors, (B,) by name, with the noise (B, z, h, w) of its latent."""

    def on_before_batch_transfer(self, batch: Example, dataloader_idx: int) -> tuple[Example, Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seed.tolist()]
        return batch, randn(latent_shape(batch.image, self.vae.config), generators)

    def training_step(self, batch: tuple[Example, Tensor], batch_idx: int) -> dict[str, Any]:
        example, noise = batch
        errors = self.errors(example.image, noise)
        losses = torch.stack([self.weights[name] * x for name, x in errors.items()]).sum(dim=0)
        metrics = {name: x.detach() for name, x in {"loss": losses, **errors}.items()}
        return self.step_result(losses.mean(), example.file, metrics)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(len(self.weights) + 1, dtype=torch.float64)

    def validation_step(self, batch: tuple[Example, Tensor], batch_idx: int) -> None:
        with self.averaged():
            errors = self.errors(batch[0].image, batch[1])
        self.sums += torch.tensor([*(errors[name].sum().item() for name in self.weights), len(batch[1])])

    def on_validation_epoch_end(self) -> None:
        *sums, n = sum_over_processes(self.trainer, self.sums).tolist()
        self.log_validation({f"val/{name}": x / n for name, x in zip(self.weights, sums, strict=True)})


class VAETraining(DecodingTask):
    """Trains an autoencoder.

    Its checkpoints have the autoencoder's keys as they are in Paint by Example, and an entry `pbe` with `about` and
    with the `latent_scale` that brings its latents to unit variance, measured on the validation pictures where the
    encoder trains.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        config: VAETrainingConfig,
        optimizer: OptimizerConfig,
        about: Mapping[str, Any] | None = None,
    ):
        super().__init__(vae, optimizer, about)
        if config.train == "all" and vae.config.latent_scale != 1:
            raise ValueError(f"an autoencoder is trained with latent_scale 1, got {vae.config.latent_scale}")
        if config.train == "decoder":
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        if config.compile:
            vae.encoder.compile()
            vae.decoder.compile()
        self.config, self.weights = config, {"l1": 1.0, "kl": config.kl_weight}

    def errors(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Each picture's mean absolute error and divergence from N(0, 1)."""
        posterior = self.vae.encode(image)
        mean, std = posterior.mean.float(), posterior.std.float()
        reconstruction = self.vae.decode(mean + std * noise)[..., : image.shape[-2], : image.shape[-1]]
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log())
        return {"l1": mean_absolute(reconstruction.float() - image), "kl": kl.flatten(1).mean(dim=1)}

    # --- the latents' scale -------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_scale(self) -> float:
        """1 / the standard deviation of the validation pictures' latents."""
        sums = torch.zeros(3, dtype=torch.float64)  # of values, squares and ones
        loader = self.trainer.val_dataloaders or data_of(self.trainer).val_dataloader()
        for batch in itertools.islice(loader, self.num_scale_batches(len(loader))):
            example, noise = self.on_before_batch_transfer(batch, 0)
            with self.averaged():
                z = self.vae.encode(example.image.to(self.device)).sample(noise.to(self.device)).cpu().double()
            sums += torch.tensor([z.sum().item(), z.square().sum().item(), z.numel()], dtype=torch.float64)
        first, second, n = sum_over_processes(self.trainer, sums).tolist()
        return (second / n - (first / n) ** 2) ** -0.5

    def num_scale_batches(self, available: int) -> int:
        """As many batches as validation uses; where it uses none, all."""
        limit = self.trainer.limit_val_batches
        limit = int(limit * available) if isinstance(limit, float) else limit  # rounded down, as by Lightning
        return min(limit, available) or available

    # --- checkpoints --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {VAE_PREFIX + name.removeprefix("vae."): x for name, x in state.items()}
        scale = self.measure_scale() if self.config.train == "all" else self.vae.config.latent_scale
        checkpoint["pbe"] = {"latent_scale": scale, **self.about}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {"vae." + name.removeprefix(VAE_PREFIX): x for name, x in state.items()}


def mean_absolute(difference: Tensor) -> Tensor:
    """The mean absolute value (B,) of each picture's difference (B, ...)."""
    return difference.abs().flatten(1).mean(dim=1)
