"""A model's four networks as files for another runtime, of any batch and picture size, and what explains them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from pbe.acceleration import PreparedModel, prepare_for_inference
from pbe.checkpoints.formats.opening import EXPORT_JSON, is_exported
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.writing import BETA_END, BETA_START, NUM_TIMESTEPS
from pbe.io.atomic import replacing
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Runtime = Literal["onnx", "torch-export"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
PARTS = ("unet", "vae", "exemplar")  # of the config, that export.json holds

# a text is open: "batch", "height" and "width" of latents, "8*height" of pixels
Shape = tuple[int | str, ...]
TENSORS = {
    "unet_in": "z_t, z_masked and mask in a row: noisy latents, scaled latents of the masked image, and the mask at "
    "latent size in [0, 1], 1 = keep",
    "t": "whole timesteps, 0 to 999 (int64)",
    "context": "the exemplar encoder's output, or `null_context`",
    "eps": "the predicted noise",
    "image": "RGB, [-1, 1]; the decoder's is not clamped",
    "mean": "the posterior's mean, as scaled latents",
    "std": "the posterior's standard deviation, on the same scale",
    "z_0": "scaled latents",
    "exemplar": "RGB, normalised as for CLIP, about [-2, 2.7]",
}


@dataclass(frozen=True)
class Network:
    """A function of a model, the modules whose parameters it uses, and its tensors by name with their shapes."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    parts: tuple[nn.Module, ...]
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


class Traced(nn.Module):
    """A function with its parameters, as `torch.export` takes it."""

    def __init__(self, network: Network):
        super().__init__()
        self.function, self.parts = network.function, nn.ModuleList(network.parts)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*inputs)


def export_model(
    model: PaintByExample,
    folder: str | Path,
    to: Runtime = "onnx",
    source: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the UNet, the autoencoder's encoder and decoder, and the exemplar encoder to a folder that
    `load_exported` opens, with a README.md and `export.json`; needs the extra `export`.

    The weights of "onnx" lie in a file beside each graph, without its limit of 2 GB. `source` says where the model is
    from, as JSON values. Adapters are folded in, and so is the cross-attention over the exemplar's one token.

    Raises:
        ValueError: for another runtime, for a prepared model, and for one in another precision than float32.
        FileExistsError: for an existing folder, unless `overwrite` is set and it is an exported one.
        ImportError: without the extra.
    """
    folder = Path(folder).resolve()
    if to not in get_args(Runtime):
        raise ValueError(f"unknown runtime {to!r}, choose one of {', '.join(get_args(Runtime))}")
    if model.dtype != torch.float32:
        raise ValueError(f"models are exported in float32: load this one with dtype='float32', not in {model.dtype}")
    if folder.exists() and not is_exported(folder):
        raise FileExistsError(f"{folder} exists and is not an exported folder; it is not replaced")
    if to == "onnx" and (missing := [name for name in ("onnx", "onnxscript") if not find_spec(name)]):
        raise ImportError(f"writing ONNX needs {' and '.join(missing)}, the extra export: pip install pbe[export]")
    # as plain layers, which other runtimes know best
    prepared = prepare_for_inference(model, sum_phases=False, tile_attention=False, strips=False)
    networks = networks_of(prepared)
    with replacing(folder, overwrite) as part:
        part.mkdir()
        for name, network in networks.items():
            save(trace(network, model.config), network, part / (name + SUFFIXES[to]))
        files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        about = describe(prepared, networks, to, files) | {"source": dict(source or {})}
        (part / EXPORT_JSON).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(readme(networks, model.config, to), encoding="utf-8")


def networks_of(model: PreparedModel) -> dict[str, Network]:
    """What is exported of a model, by the files' names."""
    config, f = model.config, model.config.vae.downsampling
    exemplar, unet, vae = config.exemplar, model.unet, model.vae
    latents: Shape = ("batch", config.vae.latent_channels, "height", "width")
    pixels: Shape = ("batch", 3, f"{f}*height", f"{f}*width")
    context: Shape = (
        "batch",
        1 if exemplar.tokens == "class" else exemplar.vision.num_positions,
        config.unet.context_dim,
    )
    unet_in: Shape = ("batch", config.unet.in_channels, "height", "width")
    side = exemplar.vision.image_size
    return {
        "unet": Network(
            unet.forward, (unet,), {"unet_in": unet_in, "t": ("batch",), "context": context}, {"eps": latents}
        ),
        "vae_encoder": Network(
            lambda image: tuple(vae.encode(image)),
            (vae.encoder, vae.quant_conv),
            {"image": pixels},
            {"mean": latents, "std": latents},
        ),
        "vae_decoder": Network(vae.decode, (vae.decoder, vae.post_quant_conv), {"z_0": latents}, {"image": pixels}),
        "exemplar_encoder": Network(
            model.encode_exemplar,
            (model.cond_stage_model, model.proj_out),
            {"exemplar": ("batch", 3, side, side)},
            {"context": context},
        ),
    }


def smallest_side(config: PaintByExampleConfig) -> int:
    """Of latents, in cells: `torch.export` takes maps of one row or column for ones that are broadcast."""
    return 2 ** (len(config.unet.channel_mult) - 1) + 1


def open_dims(config: PaintByExampleConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """The dimensions that stay open, and sizes to trace with, by their texts in a `Shape`."""
    from torch.export import Dim

    f, smallest = config.vae.downsampling, smallest_side(config)
    dims: dict[str, Any] = {"batch": Dim("batch", min=1)}
    sizes = {"batch": 2}
    for i, name in enumerate(("height", "width")):
        dims[name], sizes[name] = Dim(name, min=smallest), smallest + 3 + i
        dims[f"{f}*{name}"], sizes[f"{f}*{name}"] = f * dims[name], f * sizes[name]
    return dims, sizes


@torch.no_grad()
def trace(network: Network, config: PaintByExampleConfig) -> ExportedProgram:
    """The network as a program for every batch and size."""
    dims, sizes = open_dims(config)
    example = tuple(
        torch.zeros([sizes[n] if isinstance(n, str) else n for n in shape], dtype=dtype_of(name))
        for name, shape in network.inputs.items()
    )
    shapes = tuple({i: dims[n] for i, n in enumerate(shape) if isinstance(n, str)} for shape in network.inputs.values())
    program = torch.export.export(Traced(network).eval(), example, dynamic_shapes=(shapes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this library, by their paths on this machine
    return program


def dtype_of(name: str) -> torch.dtype:
    return torch.int64 if name == "t" else torch.float32


def save(program: ExportedProgram, network: Network, path: Path) -> None:
    """Writes a program as ONNX, its weights beside it, or as it is: as the suffix says."""
    if path.suffix != SUFFIXES["onnx"]:
        torch.export.save(program, path)
        return
    inputs, outputs = network.inputs, network.outputs
    names = {"input_names": list(inputs), "output_names": list(outputs)}
    written = torch.onnx.export(program, (), **names, dynamo=True, verbose=False)
    assert written is not None
    graph = written.model.graph
    for value, shape in zip([*graph.inputs, *graph.outputs], [*inputs.values(), *outputs.values()], strict=True):
        value.shape = type(value.shape)(shape)  # its names rather than s25
    for node in graph.all_nodes():
        node.metadata_props.clear()
    written.save(path, external_data=True)


# --- what explains the folder -----------------------------------------------------------------------------


def describe(
    model: PreparedModel, networks: Mapping[str, Network], to: Runtime, files: Mapping[str, int]
) -> dict[str, Any]:
    """What editing needs to know beside the networks, as JSON values: `export.json`."""
    config = model.config
    return {
        "runtime": to,
        "dtype": "float32",
        "files": dict(files),  # in bytes
        "networks": {name: {"inputs": one.inputs, "outputs": one.outputs} for name, one in networks.items()},
        "smallest": smallest_side(config),
        "config": {name: asdict(getattr(config, name)) for name in PARTS},
        "null_context": model.null_context.flatten().tolist(),
        "schedule": {"beta_start": BETA_START, "beta_end": BETA_END, "num_timesteps": NUM_TIMESTEPS},
        "pbe": pbe_entry(config),
    }


def readme(networks: Mapping[str, Network], config: PaintByExampleConfig, to: Runtime) -> str:
    """The folder's README.md."""
    smallest, f, scale = smallest_side(config), config.vae.downsampling, config.vae.latent_scale
    return f"""\
# Paint by Example, exported ({to})

Networks of a Paint by Example model (arXiv 2211.13227) in float32, written by pbe. `pbe edit --ckpt FOLDER` and
`pbe.export.load_exported(FOLDER)` edit with them. `{EXPORT_JSON}` has the model's sizes, the schedule, `null_context`
and where the weights are from.

| network | tensor | shape | values |
|---|---|---|---|
{"".join(rows(networks, SUFFIXES[to]))}
`batch` is at least 1. `height` and `width` count latent cells, at least {smallest} each, of {f}x{f} pixels: pictures
have sides that {f} divides, of at least {smallest * f} pixels. Inputs are positional, in this order. Latents are scaled
by {scale:g} inside the networks, and nowhere else.

Guidance λ is one batch of 2B: `unet_in` and `t` twice, with `null_context` for the first B and the exemplar's context
for the others; eps = eps_u + λ (eps_c - eps_u). Without guidance (λ = 1) B samples with the exemplar's context do.

sqrt(beta_t) is linear in t, from sqrt({BETA_START}) to sqrt({BETA_END}) in {NUM_TIMESTEPS} timesteps.
"""


def rows(networks: Mapping[str, Network], suffix: str) -> Iterable[str]:
    for file, network in networks.items():
        for kind, tensors in (("input", network.inputs), ("output", network.outputs)):
            for name, shape in tensors.items():
                yield f"| `{file}{suffix}` | {kind} `{name}` | ({', '.join(map(str, shape))}) | {TENSORS[name]} |\n"
