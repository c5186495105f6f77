"""diffusers' classes, wherever its releases keep them, and OpenVINO's form of its networks."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def paint_by_example() -> ModuleType:
    """diffusers' package of the pipeline, which later releases moved."""
    old, new = "diffusers.pipelines.paint_by_example", "diffusers.pipelines.deprecated.paint_by_example"
    return import_module(old if find_spec(old) else new)


def network_classes() -> dict[str, Any]:
    """The classes of the networks in a diffusers folder, by the folder of each."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    encoder = import_module(f"{paint_by_example().__name__}.image_encoder").PaintByExampleImageEncoder
    return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "image_encoder": encoder}


def load_pipeline(folder: str, dtype: Any) -> Any:
    """The pipeline of a diffusers folder."""
    import diffusers

    # where the package moved, diffusers does not find the name that model_index.json gives its encoder
    setattr(diffusers.pipelines, "paint_by_example", paint_by_example())  # noqa: B010
    return diffusers.PaintByExamplePipeline.from_pretrained(folder, torch_dtype=dtype)


def scheduler(sampler: str, spacing: str, plms: Any) -> Any:
    """The scheduler that computes a sampler of ours, from the pipeline's own, which is PLMS; ValueError for another."""
    from diffusers import DPMSolverMultistepScheduler

    if (sampler, spacing) == ("plms", "leading"):
        return plms
    if sampler == "dpm_solver":
        return DPMSolverMultistepScheduler.from_config(plms.config, timestep_spacing=spacing)
    raise ValueError(f"diffusers is measured with plms or dpm_solver, not with {sampler!r} and {spacing!r}")


class Positional(nn.Module):
    """A network of diffusers as a function of tensors alone, for conversion."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.network(*inputs)
        return output if isinstance(output, Tensor) else output.sample


def converted(network: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> Callable[..., Tensor]:
    """What OpenVINO computes of a float32 network, for inputs of these sizes, on as many threads as torch has.

    The network's own weights are given up.
    """
    import openvino

    shapes = [list(x.shape) for x in inputs]
    graph = openvino.convert_model(Positional(network), example_input=inputs, input=shapes)
    network.to("meta")
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(graph, "CPU", settings)
    return lambda *inputs: torch.from_numpy(compiled([x.numpy() for x in inputs])[0])
