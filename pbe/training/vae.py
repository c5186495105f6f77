"""Training a small autoencoder for small models: reconstruction and a slight pull to the normal distribution.

Two terms make its pictures sharp where the mean absolute error alone leaves them soft, as in VQGAN (Esser et al. 2021,
arXiv 2012.09841): a distance of features, and a discriminator that learns to tell reconstructions from photos.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.data.example import Example
from pbe.io.fields import Range, check_fields
from pbe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from pbe.models.vae import AutoencoderKL
from pbe.sampling import randn
from pbe.training.draws import latent_shape
from pbe.training.optimizer import OptimizerConfig
from pbe.training.task import TrainingTask, data_of, sum_over_processes


@dataclass
class PerceptualConfig:
    """The distance of reconstructions from their photos in a frozen network's features, LPIPS."""

    network: str
    """Its file: of `pbe evaluate surrogate`, whose levels' features are compared, without learned weights; or
    torchvision's AlexNet (`alexnet-owt-7be5be79.pth`), with LPIPS's own."""
    weight: Annotated[float, Range(0, above=True)] = 1.0
    """Of the distance against the mean absolute error."""

    def __post_init__(self) -> None:
        check_fields(self, "training.perceptual")


@dataclass
class AdversarialConfig:
    """A discriminator of patches, which trains in the same steps; `optimizer.parts.discriminator` has its rate."""

    weight: Annotated[float, Range(0, above=True)] = 0.1
    """Of minus its mean logit of a reconstruction against the mean absolute error."""
    start: Annotated[int, Range(0)] = 0
    """Optimiser steps before the autoencoder learns of it too: the discriminator learns from the first."""
    channels: Annotated[int, Range(8, step=8)] = DiscriminatorConfig.channels
    """Of its first layer."""
    num_layers: Annotated[int, Range(1)] = DiscriminatorConfig.num_layers
    """That halve the picture: two see patches of 34 x 34 pixels, three of 70 x 70."""

    def __post_init__(self) -> None:
        check_fields(self, "training.adversarial")


@dataclass
class VAETrainingConfig:
    """How an autoencoder is trained."""

    train: Literal["all", "decoder"] = "all"
    """All of it, or the decoder alone: the latents stay what they are, and a model trained on them can take the decoder
    over (`pbe checkpoint set-vae`)."""
    kl_weight: Annotated[float, Range(0)] = 1e-4
    """Of the Kullback-Leibler divergence, a mean over latent values, against the mean absolute error."""
    perceptual: PerceptualConfig | None = None
    """`{network: judge.ckpt, weight: 1.0}`: a distance of features is part of the loss."""
    adversarial: AdversarialConfig | None = None
    """`{weight: 0.1, start: 0}`: a discriminator's judgement is part of the loss."""

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
    encoder trains. A discriminator lies beside them, in the entry `discriminator`.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        config: VAETrainingConfig,
        optimizer: OptimizerConfig,
        about: Mapping[str, Any] | None = None,
        perceptual: nn.Module | None = None,
        discriminator: PatchDiscriminator | None = None,
    ):
        super().__init__(vae, optimizer, about)
        self.perceptual, self.discriminator = perceptual, discriminator
        if config.train == "all" and vae.config.latent_scale != 1:
            raise ValueError(f"an autoencoder is trained with latent_scale 1, got {vae.config.latent_scale}")
        if config.train == "decoder":
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        if config.compile:
            vae.encoder.compile()
            vae.decoder.compile()
        self.config, self.weights = config, {"l1": 1.0, "kl": config.kl_weight}
        if config.perceptual:
            self.weights["perceptual"] = config.perceptual.weight
        if config.adversarial:
            self.weights |= {"adversarial": config.adversarial.weight, "discriminator": 1.0}

    def errors(self, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Each picture's mean absolute error, divergence from N(0, 1), and what else is part of the loss."""
        posterior = self.vae.encode(image)
        mean, std = posterior.mean.float(), posterior.std.float()
        reconstruction = self.vae.decode(mean + std * noise)[..., : image.shape[-2], : image.shape[-1]].float()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log())
        errors = {"l1": mean_absolute(reconstruction - image), "kl": kl.flatten(1).mean(dim=1)}
        if self.perceptual is not None:
            errors["perceptual"] = self.perceptual(reconstruction, image)
        if self.discriminator is not None:
            errors |= adversarial_errors(self.discriminator, reconstruction, image)
        return errors

    # --- the discriminator --------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: tuple[Example, Tensor], batch_idx: int) -> None:
        if adversarial := self.config.adversarial:
            self.weights["adversarial"] = adversarial.weight if self.global_step >= adversarial.start else 0.0

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norms of the autoencoder's gradients and of the discriminator's apart."""
        if self.discriminator is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for network in (self.vae, self.discriminator):
            nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_val)

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
        state = {name: x for name, x in checkpoint["state_dict"].items() if name.startswith("vae.")}
        checkpoint["state_dict"] = {VAE_PREFIX + name.removeprefix("vae."): x for name, x in state.items()}
        if self.discriminator is not None:
            checkpoint["discriminator"] = self.discriminator.state_dict()
        scale = self.measure_scale() if self.config.train == "all" else self.vae.config.latent_scale
        checkpoint["pbe"] = {"latent_scale": scale, **self.about}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {"vae." + name.removeprefix(VAE_PREFIX): x for name, x in checkpoint["state_dict"].items()}
        state |= {f"discriminator.{name}": x for name, x in checkpoint.get("discriminator", {}).items()}
        frozen = {name: x for name, x in self.state_dict().items() if name.startswith("perceptual.")}
        checkpoint["state_dict"] = state | frozen


def adversarial_errors(discriminator: PatchDiscriminator, reconstruction: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Each picture's hinge losses (B,): `adversarial` has gradients for the autoencoder alone, `discriminator` for the
    discriminator alone, so that one step minimises both."""
    fixed = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    judged = functional_call(discriminator, fixed, (reconstruction,)).float()
    real, fake = (discriminator(x).float() for x in (image, reconstruction.detach()))
    hinge = 0.5 * (F.relu(1 - real) + F.relu(1 + fake))
    return {"adversarial": -judged.flatten(1).mean(dim=1), "discriminator": hinge.flatten(1).mean(dim=1)}


def mean_absolute(difference: Tensor) -> Tensor:
    """The mean absolute value (B,) of each picture's difference (B, ...)."""
    return difference.abs().flatten(1).mean(dim=1)
