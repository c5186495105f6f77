"""Editing with exported networks: a model whose networks another runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from pbe.acceleration import PreparedModel
from pbe.checkpoints.formats.opening import EXPORT_JSON, CheckpointError, is_exported, open_checkpoint
from pbe.checkpoints.loading import choose_device, choose_dtype
from pbe.export.writing import SUFFIXES, smallest_side
from pbe.io.fields import field_types
from pbe.models.paint_by_example import PaintByExampleConfig
from pbe.models.vae import AutoencoderKL, Posterior, VAEConfig, pad_to_multiple

Run = Callable[..., tuple[Tensor, ...]]


class ExportedNetwork(nn.Module):
    """A network of one output that another runtime computes."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(*inputs)[0]


class ExportedVAE(AutoencoderKL):
    """The autoencoder's two halves, for pictures of at least `smallest` latent cells a side."""

    def __init__(self, config: VAEConfig, encoder: Run, decoder: Run, smallest: int):
        nn.Module.__init__(self)  # another runtime holds the networks
        self.config, self.run_encoder, self.run_decoder, self.smallest = config, encoder, decoder, smallest

    def encode(self, image: Tensor) -> Posterior:
        image = pad_to_multiple(image, self.config.downsampling)
        height, width = image.shape[2:]
        least = self.smallest * self.config.downsampling
        if min(height, width) < least:
            raise ValueError(
                f"exported networks take pictures of at least {least}x{least} pixels, not {width}x{height}"
            )
        return Posterior(*self.run_encoder(image))

    def decode(self, z_0: Tensor) -> Tensor:
        return self.run_decoder(z_0)[0]


class ExportedModel(PreparedModel):
    """What `pbe.edit` needs of a model, with exported networks; made by `load_exported`."""

    def __init__(self, config: PaintByExampleConfig, null_context: Tensor, runs: Mapping[str, Run]):
        nn.Module.__init__(self)
        self.config = config
        self.model = nn.ModuleDict({"diffusion_model": ExportedNetwork(runs["unet"])})
        halves = runs["vae_encoder"], runs["vae_decoder"]
        self.first_stage_model = ExportedVAE(config.vae, *halves, smallest_side(config))
        self.cond_stage_model = cast(Any, ExportedNetwork(runs["exemplar_encoder"]))
        self.proj_out = cast(Any, nn.Identity())  # the encoder has it
        self.learnable_vector = nn.Parameter(null_context, requires_grad=False)
        self.tiny_decoder = self.detail = None


def load_exported(
    folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> ExportedModel:
    """The model in a folder that `pbe export` wrote, for `pbe.edit`.

    `device` "auto" is CUDA where the runtime has it, else the CPU. `dtype` can only be float32, as the networks are. A
    program of torch.export may execute code when it is opened, which an ONNX file cannot.

    Raises `FileNotFoundError`; `CheckpointError` for a folder that lacks a file or is damaged; `ValueError` for another
    precision, and a device that the runtime does not have; `ImportError` without ONNX Runtime.
    """
    file = open_checkpoint(folder)
    if not is_exported(folder):
        raise CheckpointError(f"{folder} is a {file.kind}, which pbe.load_model opens, not an exported folder")
    if dtype != "auto" and choose_dtype(dtype, torch.device("cpu")) != torch.float32:
        raise ValueError(f"{folder} computes in float32 alone, got dtype={str(dtype)!r}")
    try:
        about = file.extras["export"]
        config = built(PaintByExampleConfig, {**about["config"], "tiny_decoder": None})
        null_context = torch.tensor(about["null_context"], dtype=torch.float32).view(1, 1, config.unet.context_dim)
        suffix, sizes = SUFFIXES[about["runtime"]], dict(about["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{file.path / EXPORT_JSON} is damaged: {type(error).__name__}: {error}") from error
    for name, size in sizes.items():
        if not (file.path / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {EXPORT_JSON} lists")
        if (found := (file.path / name).stat().st_size) != size:
            raise CheckpointError(f"{file.path / name} is damaged: it has {found:,} bytes, not {size:,}")
    # with ONNX Runtime tensors stay on the CPU, wherever it computes
    place, open_network = ("cpu", open_onnx) if suffix == ".onnx" else (choose_device(device), open_program)
    names = ("unet", "vae_encoder", "vae_decoder", "exemplar_encoder")
    runs = {name: open_network(file.path / (name + suffix), device) for name in names}
    return ExportedModel(config, null_context.to(place), runs).eval()


def built(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of dataclasses from what JSON makes of it, in which newer fields may lack; raises what wrong values
    bring about."""
    made, types = {}, field_types(kind)
    for name, value in values.items():
        annotation = types[name]
        if is_dataclass(annotation) or isinstance(value, dict):  # the latter where it may be None
            value = built(next(filter(is_dataclass, get_args(annotation)), annotation), value)
        made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Makes any error a `CheckpointError` that names the file: each kind of damage has one of its own."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def open_onnx(path: Path, device: str | torch.device) -> Run:
    """An ONNX file in ONNX Runtime, on as many threads as torch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("ONNX files need onnxruntime, the extra export: pip install pbe[export]") from error
    there = onnxruntime.get_available_providers()
    kind, _, index = str(device).partition(":")
    if kind == "auto":
        kind = "cuda" if "CUDAExecutionProvider" in there else "cpu"
    provider = f"{kind.upper()}ExecutionProvider"
    if provider not in there:
        raise ValueError(f"device={str(device)!r} is not there: onnxruntime has {', '.join(there)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # it would keep, and grow to, several times what a UNet call needs
    chosen = (provider, {"device_id": index} if index else {})
    with opening(path):
        session = onnxruntime.InferenceSession(path, options, providers=[chosen])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = [x.detach().contiguous().numpy() for x in inputs]
        return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, arrays, strict=True)))))

    return run


def open_program(path: Path, device: str | torch.device) -> Run:
    """A program of torch.export, on a device of torch."""
    from torch.export.passes import move_to_device_pass

    place = choose_device(device)
    with opening(path):
        module = move_to_device_pass(torch.export.load(path), place).module()

    @torch.no_grad()
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        output = module(*inputs)
        return output if isinstance(output, tuple) else (output,)

    return run
