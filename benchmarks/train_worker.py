"""One system of the training benchmark in a process of its own: it loads, then does what lines on stdin ask for.

It prints how long loading took; each line read is then answered by one: `steps` by the seconds of a step and the loss
of the first one, `memory` by the peaks so far, `fits N` by whether a step with N pictures found room.
"""

import gc
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.worker import SEED, Numbers, memory, serve, synchronize
from pbe.data.example import Example
from pbe.models.lora import LoRAConfig
from pbe.models.paint_by_example import latent_mask
from pbe.training.draws import TrainingBatch, make_noise_draws
from pbe.training.loss import check_finite
from pbe.training.module import PaintByExampleTraining, TrainingConfig
from pbe.training.optimizer import OptimizerConfig, build_optimizer

EMA_DECAY = 0.9999
MAX_NORM = 1.0  # of the gradients


@dataclass(frozen=True)
class Task:
    """What all systems of a run do: `steps` optimiser steps a turn, on `batch` pictures of `resolution` pixels.

    dtype: float32, or what autocast computes in. limit_gib: how much of the GPU there is.
    """

    ckpt: str
    diffusers: str
    device: str
    dtype: str
    batch: int
    resolution: int
    steps: int
    ema: bool
    compile: bool
    limit_gib: float | None = None


def make_batch(size: int, resolution: int, downsampling: int, exemplar_size: int) -> TrainingBatch:
    """Pictures of noise with the middle masked, and what is drawn for them: the same for all systems."""
    generator = torch.Generator().manual_seed(SEED)
    image = torch.rand(size, 3, resolution, resolution, generator=generator) * 2 - 1
    mask = torch.ones(size, 1, resolution, resolution)
    quarter = resolution // 4
    mask[..., quarter:-quarter, quarter:-quarter] = 0
    exemplar = torch.randn(size, 3, exemplar_size, exemplar_size, generator=generator)
    side = resolution // downsampling
    draws = make_noise_draws(range(size), (4, side, side), 1000)
    files = [f"{i}.png" for i in range(size)]
    return TrainingBatch(Example(image, image * mask, mask, exemplar, torch.arange(size), files), draws)


class System(ABC):
    """A model in training; what all systems do after the loss: backwards, clip, AdamW, average."""

    def __init__(self, task: Task, downsampling: int, exemplar_size: int, trained: Iterable[nn.Parameter]):
        self.task, self.trained = task, list(trained)
        self.device = torch.device(task.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=task.dtype == "float16")
        self.make_batch = partial(
            make_batch, resolution=task.resolution, downsampling=downsampling, exemplar_size=exemplar_size
        )
        self.num_steps = 0
        self.optimizer: torch.optim.Optimizer

    def autocast(self) -> torch.autocast:
        half = self.task.dtype != "float32"
        return torch.autocast(self.device.type, getattr(torch, self.task.dtype) if half else None, enabled=half)

    def batch(self, size: int) -> TrainingBatch:
        """The batch on the device."""
        return self.make_batch(size).to(self.device)

    @abstractmethod
    def loss(self, batch: TrainingBatch) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def update_average(self) -> None:
        """Takes the trained parameters into their moving average."""

    def step(self, batch: TrainingBatch) -> Tensor:
        """One optimiser step; returns its loss."""
        self.num_steps += 1
        loss = self.loss(batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.task.ema:
            self.update_average()
        return loss.detach()


class Ours(System):
    """This library's training module in a plain loop; `settings` are of `TrainingConfig`."""

    def __init__(self, task: Task, settings: dict[str, Any]):
        from pbe.training.initialization import ModelConfig, starting_model

        average = EMA_DECAY if task.ema and "lora" not in settings else None
        config = TrainingConfig(**settings, compile=task.compile, ema_decay=average)
        model = starting_model(ModelConfig(init=task.ckpt), seed=0)
        self.module = PaintByExampleTraining(model, config, OptimizerConfig()).to(task.device)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        super().__init__(task, model.config.vae.downsampling, model.config.exemplar.vision.image_size, trained)
        fused = self.device.type == "cuda" and task.dtype != "float16"  # as `make_optimizer`, with clipping
        self.optimizer = build_optimizer([{"params": trained}], OptimizerConfig(), fused)

    def loss(self, batch: TrainingBatch) -> Tensor:
        with self.autocast():
            loss = self.module.batch_losses(batch).mean()
        check_finite(loss, self.num_steps, batch.example.file)
        return loss

    def update_average(self) -> None:
        if self.module.model_ema:
            self.module.model_ema.update(self.num_steps)


class Diffusers(System):
    """The same step with diffusers' modules, as its `train_text_to_image.py` writes it: frozen networks in half
    precision, image and masked image one after the other, the rest under autocast."""

    def __init__(self, task: Task, checkpointed: bool):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        dtype = getattr(torch, task.dtype)
        parts = peers.network_classes()
        self.vae, self.unet, self.encoder = (
            parts[name].from_pretrained(Path(task.diffusers) / name).to(task.device)
            for name in ("vae", "unet", "image_encoder")
        )
        self.vae.to(dtype)
        self.encoder.model.to(dtype)
        self.vae.requires_grad_(False)
        self.encoder.model.requires_grad_(False)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.unet.train()
        if checkpointed:
            self.unet.enable_gradient_checkpointing()
        if task.compile:
            self.unet.compile()
        trained = [p for network in (self.unet, self.encoder) for p in network.parameters() if p.requires_grad]
        downsampling = 2 ** (len(self.vae.config.block_out_channels) - 1)
        super().__init__(task, downsampling, self.encoder.model.config.image_size, trained)
        config = OptimizerConfig()
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
        self.average = EMAModel(trained, decay=EMA_DECAY) if task.ema else None

    def latents(self, image: Tensor, noise: Tensor) -> Tensor:
        posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist
        # as `sample()`, but of a noise that is given
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def loss(self, batch: TrainingBatch) -> Tensor:
        example, draws = batch
        z_0 = self.latents(example.image, draws.posterior_noise[:, 0])
        z_masked = self.latents(example.masked_image, draws.posterior_noise[:, 1])
        mask = latent_mask(example.mask, example.mask.shape[-1] // z_0.shape[-1])
        z_t = self.scheduler.add_noise(z_0, draws.noise, draws.t)
        with self.autocast():
            context = self.encoder(example.exemplar.to(self.vae.dtype))
            dropped = (draws.drop < TrainingConfig().drop_exemplar)[:, None, None]
            context = torch.where(dropped, self.encoder.uncond_vector.to(context), context)
            eps = self.unet(torch.cat([z_t, z_masked, mask], dim=1), draws.t, context, return_dict=False)[0]
        return nn.functional.mse_loss(eps.float(), draws.noise)

    def update_average(self) -> None:
        if self.average:
            self.average.step(self.trained)


def ours(task: Task, **settings: Any) -> System:
    """This library's training with `settings`, and under half precision with all that saves time or memory there."""
    half = {} if task.dtype == "float32" else {"frozen": task.dtype, "norms": "half"}
    return Ours(task, half | settings)


ADAPTERS = {"train": [], "lora": LoRAConfig()}
SYSTEMS: dict[str, Callable[[Task], System]] = {
    "pbe": ours,
    "pbe, plain": lambda task: Ours(task, {}),
    "pbe, encoders in half": lambda task: ours(task, norms=None),
    "pbe, channels-last": lambda task: ours(task, channels_last=True),
    "pbe, 1 level checkpointed": lambda task: ours(task, gradient_checkpointing=1),
    "pbe, checkpointed": lambda task: ours(task, gradient_checkpointing=True),
    "pbe, adapters": lambda task: ours(task, **ADAPTERS),
    "pbe, adapters, checkpointed": lambda task: ours(task, gradient_checkpointing=True, **ADAPTERS),
    "diffusers": lambda task: Diffusers(task, checkpointed=False),
    "diffusers, checkpointed": lambda task: Diffusers(task, checkpointed=True),
}


def take_steps(system: System) -> Numbers:
    """The mean seconds of the task's steps, and the first one's loss.

    The processor's own seconds are what a busy machine changes least; beside a GPU they are what starting work takes.
    """
    batch = system.batch(system.task.batch)
    synchronize(system.device)
    start, start_of_processor = time.perf_counter(), time.process_time()
    losses = [system.step(batch) for _ in range(system.task.steps)]
    processor = time.process_time() - start_of_processor
    synchronize(system.device)
    seconds = time.perf_counter() - start
    steps = system.task.steps
    return {"seconds": seconds / steps, "processor seconds": processor / steps, "loss": losses[0].item()}


def fits(system: System, size: int) -> bool:
    """Whether a step with `size` pictures finds room, beside the optimiser's state, which a first step makes."""

    def take_step() -> None:
        batch = system.batch(size)
        for _ in range(1 if system.optimizer.state else 2):
            system.step(batch)
        synchronize(system.device)

    enough = True
    try:
        take_step()
    except torch.OutOfMemoryError:
        enough = False
    # not in `except`, where the error still holds the failed step's tensors
    system.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return enough


def answer(system: System, line: str) -> Numbers:
    """Does what a line asks for."""
    what, *numbers = line.split()
    if what == "memory":
        return memory(system.device)
    if what == "fits":
        return {"fits": fits(system, int(numbers[0]))}
    assert what == "steps", line
    return take_steps(system)


def main() -> None:
    """`train_worker SYSTEM TASK …`: a name and the task as JSON."""
    name, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    if task.limit_gib:
        total = torch.cuda.get_device_properties(task.device).total_memory
        torch.cuda.set_per_process_memory_fraction(task.limit_gib * 2**30 / total)
    start = time.perf_counter()
    system = SYSTEMS[name](task)
    serve({"load s": time.perf_counter() - start}, partial(answer, system))


if __name__ == "__main__":
    main()
