"""Consistency distillation (Luo et al. 2023, arXiv 2310.04378): a student that edits in a few steps, without guidance.

The student's consistency function f(z_t, t) estimates z_0. The frozen teacher, with guidance, takes one step of DDIM
from timestep t to t - skip; the student's estimates before and after that step shall be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from pbe.data.example import EncodedExample, Example
from pbe.editing.settings import QUICK, EditSettings
from pbe.io.fields import Range, check_fields
from pbe.models.lora import adapters_off
from pbe.models.paint_by_example import Condition, Distilled, PaintByExample
from pbe.models.unet import UNet
from pbe.sampling import dpm_solver, guided_eps, trailing
from pbe.sampling.consistency import boundary_scalings
from pbe.sampling.guidance import repeated
from pbe.training.draws import TrainingBatch
from pbe.training.loss import encode, encode_draws
from pbe.training.module import PaintByExampleTraining, TrainingConfig
from pbe.training.optimizer import OptimizerConfig
from pbe.training.task import sum_over_processes

SPACE = 20  # between the timesteps where the student learns and the sampler lcm asks it: 19, 39, …, 999
DISTILLED = Distilled(sampler="lcm", steps=4, guidance=1.0)


@dataclass
class DistillationConfig:
    """What the student learns of its teacher."""

    guidance: Annotated[
        list[Annotated[float, Range(0)]], Range(2, 2), "a list of two numbers, the lowest and the highest guidance"
    ] = field(default_factory=lambda: [3.0, 7.0])
    """The lowest and the highest guidance of the teacher, drawn evenly between them for each prediction."""
    skip: Annotated[int, Range(1, 999)] = 20
    """Timesteps of the teacher's step: more of them make it less exact, and need fewer steps of training."""
    huber: Annotated[float, Range(0, above=True)] = 0.001
    """c of the pseudo-Huber loss sqrt(d^2 + c^2) - c of a latent value's difference d: about d^2 / 2c below c, |d| - c
    above."""

    def __post_init__(self) -> None:
        check_fields(self, "distillation")
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"distillation.guidance is [lowest, highest], got {self.guidance}")


class ConsistencyDistillation(PaintByExampleTraining):
    """Trains `model` to be the consistency function of what it was at the start, the teacher.

    Beneath adapters lies the teacher itself; a student that is the whole UNet has a copy of it beside, which is not
    saved: a run that goes on makes it again of what the run began with.
    """

    val_loss = "val/teacher_error"

    def __init__(
        self,
        model: PaintByExample,
        distillation: DistillationConfig,
        config: TrainingConfig,
        optimizer: OptimizerConfig,
        about: Mapping[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__(model, config, optimizer, about, seed)
        self.distillation = distillation
        self._teacher: tuple[UNet, ...] = ()  # in a tuple, which makes it no part of the module's state
        if not config.lora:
            self._teacher = (copy.deepcopy(model.unet).requires_grad_(False),)
            if config.compile:
                self._teacher[0].compile()
        model.config = replace(model.config, distilled=DISTILLED)
        alpha_bar = self.schedule.alpha_bar
        scalings = torch.tensor([boundary_scalings(t) for t in range(len(alpha_bar))])
        levels = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self.coefficients = torch.stack([*levels, *scalings.T], dim=1).float()  # (T, 4)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConsistencyDistillation:
        for teacher in self._teacher:  # goes where the module goes
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """The teacher in the student's place."""
        student = self.model.unet
        (self.model.model["diffusion_model"],) = self._teacher or (student,)
        try:
            with adapters_off(student):
                yield
        finally:
            self.model.model["diffusion_model"] = student

    def teacher_settings(self, seed: int) -> EditSettings:
        """What the student is compared with: 20 steps of the teacher with the middle of its guidance."""
        return replace(QUICK, guidance=sum(self.distillation.guidance) / 2, seed=seed)

    # --- the step -----------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Example | EncodedExample, dataloader_idx: int) -> TrainingBatch:
        example, draws = super().on_before_batch_transfer(batch, dataloader_idx)
        return TrainingBatch(example, draws._replace(t=draws.t // SPACE * SPACE + SPACE - 1))

    def batch_losses(self, batch: TrainingBatch) -> Tensor:
        """Each draw's `consistency_losses` (K B,)."""
        draws = batch.draws
        z_0, condition = encode_draws(self.model, batch, drop_exemplar=0.0)
        low, high = self.distillation.guidance
        guidance = low + (high - low) * draws.drop  # its uniform draw is free: no exemplar is dropped
        return self.consistency_losses(z_0, condition, draws.t, draws.noise, guidance)

    def consistency_losses(
        self, z_0: Tensor, condition: Condition, t: Tensor, noise: Tensor, guidance: Tensor
    ) -> Tensor:
        """The pseudo-Huber loss (B,) between the student's estimates at the timesteps t (B,) and after the teacher's
        step from there with guidance (B,)."""
        z_t = self.schedule.add_noise(z_0, noise, t)
        estimate = self.estimate(z_t, condition, t)
        with torch.no_grad():
            t_prev = (t - self.distillation.skip).clamp(min=0)
            target = self.estimate(self.teacher_step(z_t, condition, t, t_prev, guidance), condition, t_prev)
        c = self.distillation.huber
        return ((estimate - target).square() + c**2).sqrt().sub(c).flatten(1).mean(dim=1)

    def estimate(self, z_t: Tensor, condition: Condition, t: Tensor) -> Tensor:
        """f(z_t, t) = c_skip z_t + c_out z_0 with the z_0 that the student's prediction implies."""
        unet_in = torch.cat([z_t, condition.z_masked, condition.mask], dim=1)
        eps = self.model.unet(unet_in, t, condition.context).float()
        alpha, sigma, c_skip, c_out = self.coefficients_at(t)
        return c_skip * z_t + c_out * (z_t - sigma * eps) / alpha

    def teacher_step(self, z_t: Tensor, condition: Condition, t: Tensor, t_prev: Tensor, guidance: Tensor) -> Tensor:
        """One step of DDIM, from t to t_prev (B,), both halves of the guidance (B,) in one call."""
        context = condition.context
        contexts = torch.cat([self.model.null_context.to(context).expand_as(context), context])
        unet_in = torch.cat([z_t, condition.z_masked, condition.mask], dim=1)
        with self.teaching():
            eps_u, eps_c = repeated(self.model.unet, contexts)(unet_in, t).float().chunk(2)
        eps = eps_u + guidance[:, None, None, None] * (eps_c - eps_u)
        alpha, sigma, *_ = self.coefficients_at(t)
        return self.schedule.add_noise((z_t - sigma * eps) / alpha, eps, t_prev)

    def coefficients_at(self, t: Tensor) -> tuple[Tensor, ...]:
        """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t), c_skip and c_out, (B, 1, 1, 1) each."""
        table = self.coefficients.to(t.device, non_blocking=t.is_cuda)
        return table[t][:, :, None, None, None].unbind(dim=1)

    # --- validation ---------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.teacher_errors: list[Tensor] = []  # (B,) each

    def compare_exemplars(self, batch: TrainingBatch) -> None:
        """The consistency losses of a validation batch at `val_timesteps`, and how far one step of the student from
        the noisiest state ends from 20 steps of the teacher."""
        example, draws = batch
        z_0, condition = encode(self.model, example, draws.posterior_noise)
        settings = self.teacher_settings(seed=0)
        guidance = draws.drop.new_full(draws.drop.shape, settings.guidance)
        at = [torch.full_like(draws.t, t) for t in self.val_timesteps]
        losses = [self.consistency_losses(z_0, condition, t, draws.noise, guidance) for t in at]
        self.val_losses.append(torch.stack(losses, dim=1))
        grid = trailing(self.schedule, settings.steps)
        x_T = grid.start_from(self.model.start(condition), draws.noise)
        with self.teaching():
            taught = dpm_solver(guided_eps(self.model, condition, settings.guidance, grid), x_T, grid)
        T = torch.full_like(draws.t, self.schedule.num_timesteps - 1)
        self.teacher_errors.append((self.estimate(x_T, condition, T) - taught).square().flatten(1).mean(dim=1))

    def compared(self, split: str) -> dict[str, float]:
        """The mean losses, and the root of the mean squared error of one step, over all processes."""
        errors = torch.cat(self.teacher_errors).cpu().double()
        square, n = sum_over_processes(self.trainer, torch.stack([errors.sum(), torch.tensor(len(errors))])).tolist()
        return {**super().compared(split), f"{split}/teacher_error": (square / n) ** 0.5}
