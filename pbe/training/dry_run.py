"""What a training run would be, without running it: sizes, what trains, how much memory that takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pbe.data.datamodule import ExampleDataModule
from pbe.models.paint_by_example import PaintByExample
from pbe.training.config import Run
from pbe.training.distillation import ConsistencyDistillation
from pbe.training.module import PaintByExampleTraining
from pbe.training.optimizer import KINDS, parameter_groups, part_of
from pbe.training.task import TrainingTask
from pbe.training.vae import VAETraining

GIB = 2**30


def describe(config: Run, module: TrainingTask, data: ExampleDataModule) -> list[str]:
    """Lines about a run. ValueError for `optimizer.parts` of which nothing trains."""
    parameter_groups(module.named_parameters(), config.optimizer)
    parts: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts[part_of(name) or name.removeprefix("model.").partition(".")[0]] += parameter.numel()
    model = module.vae if isinstance(module, VAETraining) else getattr(module, "model", module)
    lines = [f"model: {sum(p.numel() for p in model.parameters()):,} parameters"]
    if isinstance(module, PaintByExampleTraining):
        size = module.model.config
        tokens = " x ".join(map(str, module.model.null_context.shape[1:]))
        exemplar = size.exemplar.vision.image_size
        pixels = f"{size.resolution} x {size.resolution}"
        lines[0] += f", made for {pixels} pixels, exemplars of {exemplar} x {exemplar}, a context of {tokens}"
    by_part = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    lines.append(f"trains: {parts.total():,} parameters: {by_part}")
    assert data.train is not None
    held_out = len(data.val) if data.val is not None else 0
    batch = config.data.batch_size
    lines.append(f"data: {len(data.train):,} records, {held_out:,} of validation, {batch} in a batch of each process")
    return [*lines, memory_line(config, module)]


def memory_line(config: Run, module: TrainingTask) -> str:
    """An estimate of the memory on the device of one process that has all of the parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    averages = module.model_ema.parameters() if isinstance(module, PaintByExampleTraining) and module.model_ema else ()
    teacher = module._teacher if isinstance(module, ConsistencyDistillation) else ()
    sizes = {
        "weights": sum(p.nbytes for part in (module, *teacher) for p in part.parameters()),
        "gradients": sum(p.nbytes for p in trained),
        "optimizer": sum(p.nbytes for p in trained) * KINDS[config.optimizer.name].floats,
        "averages": sum(p.nbytes for p in averages),
    }
    sizes["weights"] -= sizes["averages"]
    unsaid = "activations"
    if isinstance(module, PaintByExampleTraining):
        pictures = config.data.batch_size * module.config.noise_draws
        half = str(config.trainer.get("precision", 32)).endswith("mixed")
        kept = kept_bytes(module.model, config.data.recipe.resolution)
        sizes["what the UNet keeps for its backward pass"] = pictures * kept / (2 if half else 1)
        unsaid = "what one layer, the encoders and the device need while they compute"
        if half and module.config.norms is None:
            unsaid += ", and norms in float32 on CUDA"
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
    return f"memory: about {sum(sizes.values()) / GIB:.2f} GiB: {parts}; without {unsaid}"


class FusedAttention(TorchFunctionMode):
    """Keeps of attention what its fused kernels keep: on the device meta torch takes the one that keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def kept_bytes(model: PaintByExample, resolution: int) -> int:
    """The bytes that the UNet's forward pass in float32 keeps for its backward pass of one picture, counted on the
    device meta, to which the UNet goes: it is of no more use."""
    unet, side = model.unet.to("meta"), resolution // model.config.vae.downsampling
    parameters = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, Tensor] = {}  # by storage, and held, so that no other takes its place

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage()._cdata] = x
        return x

    config = model.config.unet
    with FusedAttention(), torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        context = torch.empty(model.null_context.shape)
        result = unet(torch.empty(1, config.in_channels, side, side), torch.zeros(1, dtype=torch.long), context)
    del result
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in parameters)
