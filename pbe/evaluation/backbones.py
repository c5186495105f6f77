"""The networks whose features are compared, each from a file the user names.

`clip=ViT-B-32.pt` · `dino=dino_vits16_pretrain.pth` · `torchvision:resnet50=resnet50.pth` · `inception=….pth` ·
`surrogate=….ckpt`. Loading is strict, and nothing is downloaded but what is named hf:….
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VisionTransformer, get_model, list_models

from pbe.checkpoints.formats.opening import CheckpointError, find_checkpoint, read_state_dict
from pbe.checkpoints.key_map import KeyMap, UnlistedNames, mismatches, renamed, shorten
from pbe.checkpoints.loading import load_model
from pbe.checkpoints.meta_device import build_on_meta
from pbe.evaluation.cocoee import centre, normalise, to_tensor
from pbe.evaluation.surrogate import load_surrogate, surrogate_input
from pbe.io.checksums import sha256_of
from pbe.models.clip import CLIP

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What torchvision's classifiers call the layer that makes logits of features.
HEADS = ("fc", "classifier", "heads", "head")


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen network that turns pictures into features.

    kind: as in the user's text. name: as reports call it. network: pictures (B, 3, h, w) to features (B, num_features).
    prepare: an RGB image to what the network takes, (3, h, w). sha256: of the file.
    """

    kind: str
    name: str
    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Image.Image], Tensor]
    num_features: int
    file: str
    sha256: str
    device: torch.device

    @property
    def is_surrogate(self) -> bool:
        return self.kind == "surrogate"

    @property
    def is_released_clip(self) -> bool:
        """Whether it is the CLIP that the paper's scores were computed with."""
        return self.kind == "clip" and self.name == "CLIP ViT-B/32"

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """float32 (B, num_features) on the CPU of prepared pictures, together if they are of one size."""
        together = len({x.shape for x in inputs}) == 1
        batches = [torch.stack(list(inputs))] if together else [x[None] for x in inputs]
        return torch.cat([self.network(batch.to(self.device)).float().cpu() for batch in batches])

    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (B, num_features) of RGB images."""
        return self([self.prepare(image) for image in images])


def load_backbone(text: str, device: str | torch.device = "cpu") -> Backbone:
    """The backbone that a text KIND=FILE names.

    ValueError for another text; FileNotFoundError, CheckpointError, or ImportError naming the extra, for the file.
    """
    kind, separator, file = text.partition("=")
    path, device = find_checkpoint(file), torch.device(device)
    name, _, model = kind.partition(":")
    if not (separator and file and name in BACKBONES and (name == "torchvision") == bool(model)):
        raise ValueError(f"{text!r} is not a backbone; give KIND=FILE, with KIND one of {', '.join(KINDS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file of weights for {kind}")
    label, module, call, prepare = BACKBONES[name](path, model)
    module.eval().requires_grad_(False).to(device)
    with torch.inference_mode():
        num_features = call(prepare(Image.new("RGB", (64, 64)))[None].to(device)).shape[1]
    return Backbone(kind, label, call, prepare, num_features, path.name, sha256_of(path), device)


# --- the kinds --------------------------------------------------------------------------------------------

Parts = tuple[str, nn.Module, Callable[[Tensor], Tensor], Callable[[Image.Image], Tensor]]


def _clip(path: Path, _: str) -> Parts:
    model = load_model(path, "cpu", torch.float32)
    if not isinstance(model, CLIP):
        raise CheckpointError(f"{path} holds {type(model).__name__}, not CLIP")
    vision = model.config.vision
    letter = {768: "B", 1024: "L"}.get(vision.width)
    size = f"ViT-{letter}/{vision.patch_size}" if letter else f"of width {vision.width}, patch {vision.patch_size}"
    return f"CLIP {size}", model, model.encode_image, partial(_centred, size=vision.image_size)


def _centred(image: Image.Image, size: int) -> Tensor:
    return normalise(to_tensor(centre(image, size)))


def _imagenet(image: Image.Image, size: int = 224, shorter: int = 256, bicubic: bool = False) -> Tensor:
    return normalise(to_tensor(centre(image, size, shorter, bicubic)), IMAGENET_MEAN, IMAGENET_STD)


def dino_table(layers: int) -> KeyMap:
    """The names of DINO's vision transformers (Caron et al. 2021, arXiv 2104.14294) as torchvision's."""
    whole = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln": "norm",
    }
    block = {
        "ln_1": "norm1",
        "self_attention.in_proj_weight": "attn.qkv.weight",
        "self_attention.in_proj_bias": "attn.qkv.bias",
        "self_attention.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    rules = renamed(whole)
    for i in range(layers):
        rules += renamed(block, f"encoder.layers.encoder_layer_{i}.", f"blocks.{i}.")
    return KeyMap(rules)


def _dino(path: Path, model_name: str) -> Parts:
    state = read_state_dict(path)
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    try:
        recipes = dino_table(layers).to_ours(state)
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        image_size = patch * round((state["pos_embed"].shape[1] - 1) ** 0.5)
        mlp_width = len(state["blocks.0.mlp.fc1.bias"])
    except (UnlistedNames, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a vision transformer of DINO's: {error}") from None
    sizes = (image_size, patch, layers, max(1, width // 64), width, mlp_width)
    model = build_on_meta(lambda given: VisionTransformer(*given), sizes)
    model.heads = nn.Identity()
    tensors = {name: recipe.build(*(state[source] for source in recipe.sources)) for name, recipe in recipes.items()}
    load_strictly(model, tensors, path)
    prepare = partial(_imagenet, size=image_size, shorter=round(image_size * 256 / 224), bicubic=True)
    return f"DINO ViT, width {width}, patch {patch}", model, model, prepare


def _torchvision(path: Path, name: str) -> Parts:
    if name not in list_models():
        raise ValueError(f"torchvision has no model {name!r}; it has, among others, {shorten(list_models(), 12)}")
    state = read_state_dict(path)
    model = build_on_meta(partial(get_model, weights=None), name)
    heads = [head for head in HEADS if hasattr(model, head)]
    if len(heads) != 1:
        raise ValueError(f"torchvision's {name} is not a classifier whose features can be told from its logits")
    load_strictly(model, state, path)
    setattr(model, heads[0], nn.Identity())
    return f"torchvision {name}", model, lambda x: model(x).flatten(1), _imagenet


def load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Fills a model on `meta` with a file's tensors; CheckpointError that tells which do not fit."""
    expected = model.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (state, expected)]
    if faults := mismatches(*shapes):
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: it {'; '.join(faults)}")
    model.load_state_dict({name: state[name].to(expected[name].dtype) for name in expected}, assign=True)


def _inception(path: Path, _: str) -> Parts:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ImportError("Inception's FID needs torch-fidelity, the extra eval: pip install pbe[eval]") from error
    from torchmetrics.image.fid import NoTrainInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles what it is given: give it tensors alone.
        tensors = Path(folder) / "inception.pth"
        torch.save(read_state_dict(path), tensors)
        try:
            # Resized as by the first implementation, which published scores follow, not antialiased.
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tensors), antialias=False)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit torch-fidelity's Inception: {error}") from None
    return "Inception v3", model, model, _bytes


def _bytes(image: Image.Image) -> Tensor:
    return (to_tensor(image) * 255).round().byte()  # the network resizes and normalises itself


def _surrogate(path: Path, _: str) -> Parts:
    model = load_surrogate(path)
    return "surrogate", model, model.features, partial(surrogate_input, size=model.config.image_size)


BACKBONES: dict[str, Callable[[Path, str], Parts]] = {
    "clip": _clip,
    "dino": _dino,
    "torchvision": _torchvision,
    "inception": _inception,
    "surrogate": _surrogate,
}
KINDS = tuple("torchvision:MODEL" if name == "torchvision" else name for name in BACKBONES)
