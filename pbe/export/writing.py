"""A model's four networks as files for another runtime, of any batch and picture size, and what explains them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}  # of the networks' files, by runtime
# By a tensor's name its shape. A text is open: "batch", "height" and "width" of latents, "8*height" of pixels.
Shapes = Mapping[str, Sequence[int | str]]


class Network(nn.Module):
    """A function of a model, for export: the parts that have its parameters, and its tensors."""

    def __init__(self, function: Callable[..., Any], parts: Sequence[nn.Module], inputs: Shapes, outputs: Shapes):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(*inputs)


def export_model(
    model: PaintByExample,
    folder: str | Path,
    to: str = "onnx",
    source: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that `load_exported` opens, for the runtime "onnx" (which needs the extra `export`) or
    "torch-export". `source` says where the model is from, as JSON values. Adapters are folded in.

    Raises:
        ValueError: for another runtime, a prepared model, and one that is not in float32 on the CPU.
        FileExistsError: for an existing folder, unless `overwrite` is set and it is an exported one.
        ImportError: without the extra.
    """
    folder = Path(folder).resolve()
    if to not in SUFFIXES:
        raise ValueError(f"unknown runtime {to!r}, choose one of {', '.join(SUFFIXES)}")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        found = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
        raise ValueError(f"models are exported in float32 on the CPU, not in {found}: load_model(…, 'cpu', 'float32')")
    if model.detail is not None:
        raise ValueError("a detail adapter cannot be exported: other runtimes take contexts without its tokens")
    if folder.exists() and not is_exported(folder):
        raise FileExistsError(f"{folder} exists and is not an exported folder; it is not replaced")
    if to == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        raise ImportError("writing ONNX needs onnx and onnxscript, the extra export: pip install pbe[export]")
    # as plain layers, which other runtimes know best
    networks = networks_of(prepare_for_inference(model, sum_phases=False, tile_attention=False, strips=False))
    with replacing(folder, overwrite) as part:
        part.mkdir()
        for name, network in networks.items():
            save(trace(network, model.config), network, part / (name + SUFFIXES[to]))
        about = {
            "runtime": to,
            "files": {path.name: path.stat().st_size for path in sorted(part.iterdir())},
            "config": asdict(model.config),
            "null_context": model.null_context.flatten().tolist(),
            "schedule": {"beta_start": BETA_START, "beta_end": BETA_END, "num_timesteps": NUM_TIMESTEPS},
            "pbe": pbe_entry(model.config),
            "source": source,
        }
        (part / EXPORT_JSON).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(readme(networks, model.config, to), encoding="utf-8")


def networks_of(model: PreparedModel) -> dict[str, Network]:
    """What is exported, by the files' names."""
    unet, vae, exemplar, f = model.unet, model.vae, model.config.exemplar, model.config.vae.downsampling
    latents = ("batch", model.config.vae.latent_channels, "height", "width")
    image = {"image": ("batch", 3, f"{f}*height", f"{f}*width")}
    context = {"context": ("batch", exemplar.num_tokens, model.config.unet.context_dim)}
    unet_in = {"unet_in": ("batch", model.config.unet.in_channels, "height", "width"), "t": ("batch",)}
    pixels = {"exemplar": ("batch", 3, exemplar.vision.image_size, exemplar.vision.image_size)}
    encoder, decoder = (vae.encoder, vae.quant_conv), (vae.decoder, vae.post_quant_conv)
    return {
        "unet": Network(unet.forward, [unet], {**unet_in, **context}, {"eps": latents}),
        "vae_encoder": Network(lambda x: tuple(vae.encode(x)), encoder, image, {"mean": latents, "std": latents}),
        "vae_decoder": Network(vae.decode, decoder, {"z_0": latents}, image),
        "exemplar_encoder": Network(model.encode_exemplar, [model.cond_stage_model, model.proj_out], pixels, context),
    }


def smallest_side(config: PaintByExampleConfig) -> int:
    """Of latents, in cells: `torch.export` would take a feature map of one row for one that is to be repeated."""
    return 2 ** (len(config.unet.channel_mult) - 1) + 1


@torch.no_grad()
def trace(network: Network, config: PaintByExampleConfig) -> ExportedProgram:
    """The network as a program for every batch and size."""
    from torch.export import Dim  # takes seconds

    f, smallest = config.vae.downsampling, smallest_side(config)
    dims: dict[str, Any] = {"batch": Dim("batch", min=1)}
    sizes: dict[str, int] = {"batch": 2}
    for side in ("height", "width"):
        dims[side], sizes[side] = Dim(side, min=smallest), smallest + len(side)  # two sizes that differ
        dims[f"{f}*{side}"], sizes[f"{f}*{side}"] = f * dims[side], f * sizes[side]
    example = tuple(
        torch.zeros([n if isinstance(n, int) else sizes[n] for n in shape]).to(torch.int64 if name == "t" else None)
        for name, shape in network.inputs.items()
    )
    shapes = tuple({i: dims[n] for i, n in enumerate(shape) if isinstance(n, str)} for shape in network.inputs.values())
    program = torch.export.export(network.eval(), example, dynamic_shapes=(shapes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this library, by their paths on this machine
    return program


def save(program: ExportedProgram, network: Network, path: Path) -> None:
    """Writes a program: as it is, or as ONNX with its weights in a file beside it, which may have more than 2 GB."""
    if path.suffix != SUFFIXES["onnx"]:
        torch.export.save(program, path)
        return
    from onnxscript import ir

    inputs, outputs = network.inputs, network.outputs
    written = torch.onnx.export(program, (), input_names=[*inputs], output_names=[*outputs], dynamo=True, verbose=False)
    assert written is not None
    graph = written.model.graph
    for tensor, shape in zip([*graph.inputs, *graph.outputs], [*inputs.values(), *outputs.values()], strict=True):
        tensor.shape = ir.Shape(shape)  # its names rather than s25
    for node in graph.all_nodes():
        node.metadata_props.clear()  # paths again
    written.save(path, external_data=True)


def readme(networks: Mapping[str, Network], config: PaintByExampleConfig, to: str) -> str:
    """The folder's README.md."""

    def listed(tensors: Shapes) -> str:
        return ", ".join(f"`{name}` ({', '.join(map(str, shape))})" for name, shape in tensors.items())

    table = "".join(
        f"| `{n}{SUFFIXES[to]}` | {listed(x.inputs)} | {listed(x.outputs)} |\n" for n, x in networks.items()
    )
    f, smallest, scale = config.vae.downsampling, smallest_side(config), config.vae.latent_scale
    return f"""\
# Paint by Example, exported ({to})

The networks of a Paint by Example model (arXiv 2211.13227), written by pbe, for `pbe edit --ckpt FOLDER` and
`pbe.export.load_exported(FOLDER)`. `{EXPORT_JSON}` has sizes, schedule, null context and the weights' source.

| network | inputs, in this order | outputs |
|---|---|---|
{table}
All are float32 but `t`, int64. `batch` is at least 1; `height` and `width`, cells of {f}x{f} pixels, {smallest}.

- `image`: RGB in [-1, 1], not clamped where it is decoded; `exemplar`: RGB, normalised for CLIP, about [-2, 2.7]
- `mean`, `std`: the posterior over latents; `z_0`: latents; their scale, {scale:g}, is applied inside the networks
- `unet_in`: z_t, the masked image's latent, the mask in [0, 1], 1 = keep; `t`: whole timesteps, 0 to 999
- `context`: the exemplar encoder's, or the null context; `eps`: the predicted noise

Guidance λ is one batch of 2B: `unet_in` and `t` twice, with the null context for the first B and the exemplar's for
the others; eps = eps_u + λ (eps_c - eps_u). For λ = 1 a batch of B with the exemplar's context will do.
"""
