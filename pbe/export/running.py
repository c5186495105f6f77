"""Editing with exported networks: a model whose networks another runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from pbe.acceleration import PreparedModel
from pbe.acceleration.unet import PreparedUNet
from pbe.checkpoints.formats.opening import EXPORT_JSON, CheckpointError, is_exported, open_checkpoint
from pbe.checkpoints.infer_config import Hints
from pbe.checkpoints.loading import choose_device, choose_dtype, hints_of
from pbe.export.writing import SUFFIXES
from pbe.models.clip import CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import PaintByExampleConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import AutoencoderKL, Posterior, VAEConfig, pad_to_multiple

Run = Callable[..., tuple[Tensor, ...]]
Sizes = TypeVar("Sizes")


class ExportedNetwork(nn.Module):
    """A network of one output that another runtime computes."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        (output,) = self.run(*inputs)
        return output


class ExportedVAE(AutoencoderKL):
    """The autoencoder's two halves; pictures have at least `smallest` latent cells along a side."""

    def __init__(self, config: VAEConfig, encoder: Run, decoder: Run, smallest: int):
        nn.Module.__init__(self)  # another runtime holds the networks
        self.config, self.run_encoder, self.run_decoder, self.smallest = config, encoder, decoder, smallest

    def encode(self, image: Tensor) -> Posterior:
        f = self.config.downsampling
        image = pad_to_multiple(image, f)
        height, width = image.shape[2:]
        if min(height, width) < self.smallest * f:
            least = f"at least {self.smallest * f} pixels along each side"
            raise ValueError(f"exported networks take pictures of {least}, not {width}x{height}")
        return Posterior(*self.run_encoder(image))

    def decode(self, z_0: Tensor) -> Tensor:
        (image,) = self.run_decoder(z_0)
        return image


class ExportedModel(PreparedModel):
    """What `pbe.edit` needs of a model, with exported networks; made by `load_exported`."""

    def __init__(self, config: PaintByExampleConfig, null_context: Tensor, runs: Mapping[str, Run], smallest: int):
        nn.Module.__init__(self)
        self.config = config
        self.model = nn.ModuleDict({"diffusion_model": ExportedNetwork(runs["unet"])})
        self.first_stage_model = ExportedVAE(config.vae, runs["vae_encoder"], runs["vae_decoder"], smallest)
        self.cond_stage_model = cast(Any, ExportedNetwork(runs["exemplar_encoder"]))
        self.proj_out = cast(Any, nn.Identity())  # a part of the exported encoder
        self.learnable_vector = nn.Parameter(null_context, requires_grad=False)
        self.tiny_decoder = None

    @property
    def unet(self) -> PreparedUNet:
        """The denoising network: `unet(unet_in, t, context)`."""
        return cast(PreparedUNet, self.model["diffusion_model"])


def load_exported(
    folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> ExportedModel:
    """The model in a folder that `pbe export` wrote, for `pbe.edit`.

    Its latents are on the CPU where ONNX Runtime computes, on `device` where torch does; `device` "auto" is CUDA where
    the runtime has it, else the CPU. `dtype` can only be what the networks compute in, float32.

    A program of torch.export may run code of its author's when it is opened, which ONNX files cannot.

    Raises `FileNotFoundError`; `CheckpointError` for a folder that lacks a file or is damaged; `ValueError` for another
    precision, and a device that the runtime does not have; `ImportError` without ONNX Runtime.
    """
    file = open_checkpoint(folder)
    if not is_exported(file.path):
        raise CheckpointError(f"{folder} is no exported folder but a {file.kind}, which pbe.load_model opens")
    if dtype != "auto" and choose_dtype(dtype, torch.device("cpu")) != torch.float32:
        raise ValueError(f"{folder} computes in float32, got dtype={str(dtype)!r}: export knows no other precision")
    try:
        about = file.extras["export"]
        config = read_config(about["config"], hints_of(file))
        null_context = torch.tensor(about["null_context"], dtype=torch.float32).view(1, 1, config.unet.context_dim)
        smallest, sizes, suffix = int(about["smallest"]), dict(about["files"]), SUFFIXES[about["runtime"]]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file.path / EXPORT_JSON} is damaged: {type(error).__name__}: {error}") from error
    check_files(file.path, sizes)
    open_network, place = (open_onnx, "cpu") if suffix == ".onnx" else (open_program, str(choose_device(device)))
    names = ("unet", "vae_encoder", "vae_decoder", "exemplar_encoder")
    runs = {name: open_network(file.path / (name + suffix), device) for name in names}
    return ExportedModel(config, null_context.to(place), runs, smallest).eval()


def read_config(parts: Mapping[str, Any], hints: Hints) -> PaintByExampleConfig:
    """The model's sizes, of JSON values; raises what wrong ones bring about."""

    def sizes(kind: type[Sizes], values: Mapping[str, Any]) -> Sizes:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    exemplar = {**parts["exemplar"], "vision": sizes(CLIPVisionConfig, parts["exemplar"]["vision"])}
    return PaintByExampleConfig(
        sizes(UNetConfig, parts["unet"]),
        sizes(VAEConfig, parts["vae"]),
        sizes(ExemplarConfig, exemplar),
        hints.resolution or PaintByExampleConfig.resolution,
        hints.distilled,
    )


def check_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """`CheckpointError` for a file that is not there, or not whole."""
    for name, size in sizes.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {EXPORT_JSON} lists")
        if (found := (folder / name).stat().st_size) != size:
            raise CheckpointError(f"{folder / name} is damaged: it has {found:,} bytes, not {size:,}")


# --- the runtimes -----------------------------------------------------------------------------------------


def open_onnx(path: Path, device: str | torch.device) -> Run:
    """An ONNX file in ONNX Runtime, on as many threads as torch has; tensors on the CPU in and out."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX files need onnxruntime, the extra export: pip install pbe[export]") from error
    there = onnxruntime.get_available_providers()
    kind, _, index = str(device).partition(":")
    if kind == "auto":
        kind = "cuda" if "CUDAExecutionProvider" in there else "cpu"
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind, kind)
    if provider not in there:
        raise ValueError(f"device={str(device)!r} is not there: onnxruntime has {', '.join(there)} alone; cpu is")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        chosen = (provider, {"device_id": index} if index else {})
        session = onnxruntime.InferenceSession(path, options, providers=[chosen])
    except Exception as error:  # each kind of damage has an exception of its own, none with a common parent
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = [np.ascontiguousarray(x.detach().cpu().numpy()) for x in inputs]
        return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True)))))

    return run


def open_program(path: Path, device: str | torch.device) -> Run:
    """A program of torch.export, on a device of torch."""
    from torch.export.passes import move_to_device_pass

    place = choose_device(device)
    try:
        program = torch.export.load(path)
    except Exception as error:  # of zip files, pickles, JSON and operators
        raise CheckpointError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    module = move_to_device_pass(program, place).module() if place.type != "cpu" else program.module()

    @torch.no_grad()
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        output = module(*inputs)
        return output if isinstance(output, tuple) else (output,)

    return run
