"""The loss of Paint by Example (arXiv 2211.13227, section 3) in plain PyTorch, for any training loop:

schedule = NoiseSchedule.scaled_linear().first(model.config.num_timesteps)
for example in loader:
    batch = add_noise_draws(example, model.config.vae, schedule.num_timesteps).to(model.device)
    training_losses(model, schedule, batch).mean().backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pbe.data.example import EncodedExample, Example
from pbe.models.paint_by_example import Condition, PaintByExample, latent_mask
from pbe.sampling import NoiseSchedule
from pbe.training.detail import DetailTrainingConfig, drop_detail
from pbe.training.draws import TrainingBatch

# The autoencoder takes more memory per picture than the UNet that trains; this many pixels keep any device busy.
ENCODED_PIXELS = 8 * 512**2


def training_losses(
    model: PaintByExample,
    schedule: NoiseSchedule,
    batch: TrainingBatch,
    drop_exemplar: float = 0.2,
    drop_exemplar_by: Literal["sample", "batch"] = "sample",
    mask_weight: float = 1.0,
    detail: DetailTrainingConfig | None = None,
) -> Tensor:
    """Each draw's mean squared error (K B,) of the predicted noise, from pictures on; the loss is their mean."""
    z_0, condition = encode_draws(model, batch, drop_exemplar, drop_exemplar_by, detail)
    return denoising_losses(model, schedule, z_0, condition, batch.draws.t, batch.draws.noise, mask_weight)


def encode_draws(
    model: PaintByExample,
    batch: TrainingBatch,
    drop_exemplar: float,
    drop_exemplar_by: Literal["sample", "batch"] = "sample",
    detail: DetailTrainingConfig | None = None,
) -> tuple[Tensor, Condition]:
    """`encode` for each of the K B draws, with the exemplars and the tokens of detail that are dropped."""
    example, draws = batch
    z_0, condition = encode(model, example, draws.posterior_noise)
    K = len(draws.t) // len(z_0)  # each picture is encoded once
    z_0, z_masked, mask = (x.repeat(K, 1, 1, 1) for x in (z_0, condition.z_masked, condition.mask))
    context = condition.context.repeat(K, 1, 1)
    context = drop_exemplars(context, model.null_context, draws.drop, drop_exemplar, drop_exemplar_by)
    if detail:
        context = drop_detail(context, model.null_context, draws.detail, detail.drop, detail.drop_tokens)
    return z_0, Condition(z_masked, mask, context)


def denoising_losses(
    model: PaintByExample,
    schedule: NoiseSchedule,
    z_0: Tensor,
    condition: Condition,
    t: Tensor,
    noise: Tensor,
    mask_weight: float = 1.0,
) -> Tensor:
    """Each sample's mean of (eps(z_t, z_masked, mask; t, context) - noise)^2, (B,), at the timesteps t (B,).

    mask_weight: of the part to repaint, against 1 of the rest; the mean is weighted, and so of the same size.
    """
    z_t = schedule.add_noise(z_0, noise, t)
    if model.config.unet.in_channels == z_t.shape[1]:
        unet_in = z_t  # a prior without the task's inputs, which `pbe checkpoint expand` adds
    else:
        unet_in = torch.cat([z_t, condition.z_masked, condition.mask], dim=1)  # (B, 9, h, w)
    eps = model.unet(unet_in, t, condition.context)
    error = (eps.float() - noise).square()
    if mask_weight != 1:
        weights = 1 + (mask_weight - 1) * (1 - condition.mask)  # (B, 1, h, w)
        error = error * weights / weights.mean(dim=(1, 2, 3), keepdim=True)
    return error.flatten(1).mean(dim=1)


def drop_exemplars(
    context: Tensor, null_context: Tensor, u: Tensor, probability: float, by: Literal["sample", "batch"] = "sample"
) -> Tensor:
    """The context (B, T, C), or the learned null context where the uniform draw `u` (B,) is below the probability, so
    that guidance has an unconditional prediction; by "batch", as in the original, the first draw decides for all."""
    u = u if by == "sample" else u[:1].expand_as(u)
    return torch.where((u < probability)[:, None, None], null_context.to(context), context)


def encode(
    model: PaintByExample, example: Example | EncodedExample, posterior_noise: Tensor
) -> tuple[Tensor, Condition]:
    """The latents z_0 (B, 4, h, w) of the images, sampled as those of the masked images are, and the condition."""
    if isinstance(example, EncodedExample):
        mean, std = example.posteriors.unbind(dim=2)  # (B, 2, z, h, w)
        z_0, z_masked = (mean + std * posterior_noise).unbind(dim=1)
        return z_0, Condition(z_masked, example.mask, model.encode_exemplar(example.exemplar))
    with torch.no_grad():
        pictures = torch.cat([example.image, example.masked_image])  # (2B, 3, H, W)
        noise = posterior_noise.transpose(0, 1).flatten(0, 1)  # (2B, 4, h, w)
        at_once = max(1, ENCODED_PIXELS // (pictures.shape[-2] * pictures.shape[-1]))
        slices = zip(pictures.split(at_once), noise.split(at_once), strict=True)
        z_0, z_masked = torch.cat([model.vae.encode(x).sample(noise) for x, noise in slices]).float().chunk(2)
    mask = latent_mask(example.mask, model.config.vae.downsampling)
    return z_0, Condition(z_masked, mask, model.encode_exemplar(example.exemplar))


Loss = Literal["noise", "velocity", "min_snr"]
MIN_SNR = 5.0  # the authors' gamma


def loss_weights(schedule: NoiseSchedule, t: Tensor, loss: Loss) -> Tensor:
    """What the squared error of the noise at each timestep (B,) is multiplied by.

    noise: 1. velocity: 1 / alpha_bar, for the error of sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 (Salimans and Ho
    2022, arXiv 2202.00512, section 4). min_snr: min(SNR, gamma) / SNR with SNR = alpha_bar / (1 - alpha_bar) (Hang et
    al. 2023, arXiv 2303.09556, section 3.4).
    """
    alpha_bar = schedule.alpha_bar
    weights = {
        "noise": torch.ones_like(alpha_bar),
        "velocity": 1 / alpha_bar,
        "min_snr": (MIN_SNR * (1 - alpha_bar) / alpha_bar).clamp(max=1),
    }
    return weights[loss].float().to(t.device, non_blocking=t.is_cuda)[t]


def check_finite(loss: Tensor, step: int, files: Sequence[str]) -> None:
    """Raises `FloatingPointError` that names the step and the batch's files."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} in step {step}, on {', '.join(files)}")
