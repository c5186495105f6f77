"""The networks that judge: loaded strictly from files, and seeing pictures as the released scripts show them."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.evaluate import main
from pbe.data.manifest import Manifest
from pbe.evaluation.backbones import Backbone, load_backbone
from pbe.evaluation.cocoee import (
    centre,
    normalise,
    read_rgb,
    real_photo,
    released_box,
    released_exemplar,
    released_region,
    to_tensor,
)
from pbe.evaluation.surrogate import count_recognised, load_surrogate, save_surrogate, train_surrogate
from pbe.models.clip import CLIP, CLIP_MEAN, CLIP_STD, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

SMALL_CLIP = CLIPConfig(
    vision=CLIPVisionConfig(width=64, num_layers=2, num_heads=2, patch_size=32, image_size=224, mlp_width=64),
    text=CLIPTextConfig(width=64, num_layers=1, num_heads=2, vocab_size=20, context_length=4, mlp_width=64),
    embed_dim=24,
)


def photo(width=100, height=70, seed=0):
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    values = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((values + rng.integers(-9, 10, values.shape)).clip(0, 255).astype(np.uint8))


def drawn(module: nn.Module, scale=0.3) -> nn.Module:
    """The module with seeded weights."""
    g = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=g)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data += 1
    return module.eval()


# --- preparing pictures -------------------------------------------------------------------------------------


def test_clips_own_preprocessing_is_transformers():
    transformers = pytest.importorskip("transformers")
    processor = transformers.CLIPImageProcessor()
    for size in ((672, 448), (100, 70), (224, 224), (90, 300)):
        image = photo(*size)
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        found = normalise(to_tensor(centre(image, 224)))
        assert found.shape == (3, 224, 224)
        # two resizers of bytes, which round a few values the other way: one of 255 steps is 0.015
        assert (found - expected).abs().mean() < 0.003


def test_real_photos_are_squares_of_512():
    for size in ((640, 427), (100, 300)):
        assert real_photo(photo(*size)).size == (512, 512)
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    middle = real_photo(image).crop((8, 0, 504, 512))  # the edge's columns are mixed
    assert middle.getcolors() == [(496 * 512, (0, 0, 255))]


def test_the_released_box_ends_before_the_last_row_and_column(tmp_path):
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:21, 15:31] = 255
    mask[5, 5] = 254  # not white
    Image.fromarray(mask).save(tmp_path / "mask.png")
    # as the script does it: first and last white pixel in reading order
    white = np.nonzero(mask.ravel() == 255)[0]
    (y0, x0), (y1, x1) = np.column_stack(np.unravel_index([white.min(), white.max()], mask.shape))
    assert released_box(tmp_path / "mask.png") == (x0, y0, x1, y1) == (15, 10, 30, 20)
    Image.fromarray(mask // 2).save(tmp_path / "gray.png")
    with pytest.raises(ValueError, match=r"gray\.png has no region of white"):
        released_box(tmp_path / "gray.png")


def test_the_released_region_is_resized_without_antialiasing(tmp_path):
    image = photo(600, 500)
    mask = np.zeros((500, 600), dtype=np.uint8)
    mask[20:480, 30:570] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = released_region(image, released_box(tmp_path / "mask.png"))

    pixels = (np.asarray(image) / 255 - CLIP_MEAN) / CLIP_STD
    crop = pixels[20:479, 30:569]  # (459, 539, 3)

    def sampled(values, n):
        """Bilinear at the centres of n pixels along the first axis, reading two values each."""
        at = ((np.arange(n) + 0.5) * len(values) / n - 0.5).clip(0, len(values) - 1)
        low = at.astype(int)
        high = np.minimum(low + 1, len(values) - 1)
        w = (at - low).reshape(-1, 1, 1)
        return values[low] * (1 - w) + values[high] * w

    expected = sampled(sampled(crop, 224).transpose(1, 0, 2), 224).transpose(2, 1, 0)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)  # float32 positions


def test_the_released_reference_is_squeezed_by_pillow():
    image = photo(90, 200)
    expected = (np.asarray(image.resize((224, 224))) / 255 - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(released_exemplar(image).permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_pictures_are_read_as_rgb(tmp_path):
    Image.new("L", (8, 6), 77).save(tmp_path / "gray.png")
    assert read_rgb(tmp_path / "gray.png").getpixel((0, 0)) == (77, 77, 77)
    photo().save(tmp_path / "photo.png")
    assert read_rgb(tmp_path / "photo.png").tobytes() == photo().tobytes()


# --- backbones --------------------------------------------------------------------------------------------


def test_clip(tmp_path):
    model = drawn(CLIP(SMALL_CLIP), 0.1)
    save_checkpoint(model.state_dict(), tmp_path / "clip.ckpt", pbe_entry(SMALL_CLIP))
    backbone = load_backbone(f"clip={tmp_path / 'clip.ckpt'}")
    assert backbone.num_features == 24
    assert backbone.name == "CLIP of width 64, patch 32"
    assert not backbone.is_released_clip
    images = [photo(), photo(60, 80, 1)]
    expected = torch.cat([model.encode_image(normalise(to_tensor(centre(image, 224)))[None]) for image in images])
    torch.testing.assert_close(backbone.features(images), expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_released_clip_is_told_from_others():
    cpu = torch.device("cpu")
    base = Backbone("clip", "CLIP ViT-B/32", nn.Identity(), to_tensor, 512, "ViT-B-32.pt", "", cpu)
    assert base.is_released_clip
    assert not replace(base, name="CLIP ViT-L/14").is_released_clip
    assert not replace(base, kind="surrogate").is_released_clip


def test_dino_is_transformers_vit(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, image_size=32, patch_size=8,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    model = drawn(transformers.ViTModel(config, add_pooling_layer=False), 0.1)
    theirs = model.state_dict()
    state = {
        "cls_token": theirs["embeddings.cls_token"],
        "pos_embed": theirs["embeddings.position_embeddings"],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": theirs["layernorm.weight"],
        "norm.bias": theirs["layernorm.bias"],
    }

    def named(*options):
        return next(theirs[name] for name in options if name in theirs)  # releases of transformers differ

    for i in range(2):
        for end in ("weight", "bias"):
            old, new = f"encoder.layer.{i}", f"layers.{i}"
            qkv = [
                named(f"{old}.attention.attention.{name}.{end}", f"{new}.attention.{letter}_proj.{end}")
                for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
            ]
            state[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(qkv)
            state[f"blocks.{i}.attn.proj.{end}"] = named(
                f"{old}.attention.output.dense.{end}", f"{new}.attention.o_proj.{end}"
            )
            for ours, names in {
                "norm1": ("layernorm_before",),
                "norm2": ("layernorm_after",),
                "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
                "mlp.fc2": ("output.dense", "mlp.fc2"),
            }.items():
                options = [f"{prefix}.{name}.{end}" for prefix in (old, new) for name in names]
                state[f"blocks.{i}.{ours}.{end}"] = named(*options)
    torch.save(state, tmp_path / "dino.pth")
    backbone = load_backbone(f"dino={tmp_path / 'dino.pth'}")
    image = photo(40, 40)
    x = backbone.prepare(image)
    assert x.shape == (3, 32, 32)
    with torch.inference_mode():
        expected = model(x[None]).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone.features([image]), expected, rtol=1e-4, atol=1e-4)

    state["blocks.0.attn.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"is not a vision transformer of DINO's: .*blocks\.0\.attn\.extra"):
        load_backbone(f"dino={tmp_path / 'other.pth'}")


def test_torchvision_gives_what_enters_the_last_layer(tmp_path):
    from torchvision.models import resnet18

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    backbone = load_backbone(f"torchvision:resnet18={tmp_path / 'resnet.pth'}")
    image = photo(300, 280)
    entered = []
    model.fc.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.inference_mode():
        model(backbone.prepare(image)[None])
    assert backbone.num_features == 512
    torch.testing.assert_close(backbone.features([image]), entered[0], rtol=1e-4, atol=1e-5)

    state = model.state_dict()
    state["fc.weight"] = state["fc.weight"][:10]
    del state["conv1.weight"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"it lacks 1: conv1\.weight; has the wrong shape in 1: fc\.weight"):
        load_backbone(f"torchvision:resnet18={tmp_path / 'other.pth'}")


def test_inception_needs_the_extra(tmp_path, monkeypatch):
    (tmp_path / "inception.pth").touch()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"the extra eval: pip install pbe\[eval\]"):
        load_backbone(f"inception={tmp_path / 'inception.pth'}")


@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = tmp_path / "inception.pth"
    torch.save({}, file)
    with monkeypatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    backbone = load_backbone(f"inception={file}")
    assert backbone.num_features == 2048
    theirs = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(file), antialias=False)
    images = [photo(64, 60, seed) for seed in range(2)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    torch.testing.assert_close(backbone.features(images), theirs.inception(pixels), rtol=1e-5, atol=1e-6)

    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"inception\.pth does not fit torch-fidelity's Inception"):
        load_backbone(f"inception={file}")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("clip", ValueError, "'clip' is not a backbone; give KIND=FILE"),
        ("vgg=a.pth", ValueError, "'vgg=a.pth' is not a backbone"),
        ("torchvision=a.pth", ValueError, "torchvision:MODEL"),
        ("clip:b=a.pth", ValueError, "'clip:b=a.pth' is not a backbone"),
        ("clip=none.pt", FileNotFoundError, "none.pt: there is no such file of weights for clip"),
        ("torchvision:resnet1={file}", ValueError, "torchvision has no model 'resnet1'"),
        ("clip={file}", CheckpointError, "fits no known model"),
        ("dino={file}", CheckpointError, "is not a vision transformer of DINO's"),
        ("surrogate={file}", CheckpointError, "does not hold a surrogate"),
    ],
)
def test_backbones_that_cannot_be_loaded(tmp_path, text, error, message):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(error, match=message):
        load_backbone(text.format(file=tmp_path / "a.pth"))


# --- surrogate ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Red and blue squares on grey, 24 pictures."""
    folder = tmp_path_factory.mktemp("colours")
    rows = ["image,x0,y0,x1,y1,label"]
    for i in range(24):
        label = ("red", "blue")[i % 2]
        image = Image.new("RGB", (40, 32), (120 + i, 120, 120))
        image.paste(label, (8, 6, 30, 26))
        image.save(folder / f"{i}.png")
        rows.append(f"{i}.png,8,6,30,26,{label}")
    (folder / "boxes.csv").write_text("\n".join(rows))
    return folder / "boxes.csv"


def test_a_stand_in_learns_and_survives_its_file(colours, tmp_path):
    before = torch.get_rng_state()
    told = []
    train = {"epochs": 8, "image_size": 16, "batch_size": 8, "seed": 3}
    model, names = train_surrogate(Manifest(colours), **train, on_epoch=lambda *args: told.append(args))
    assert torch.equal(torch.get_rng_state(), before)
    assert names == ["blue", "red"]
    assert told[-1][0] == 7
    assert told[-1][2] == 1.0  # all recognised
    again, _ = train_surrogate(Manifest(colours), **train)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))

    save_surrogate(model, tmp_path / "judge.ckpt", names, {"data": "colours"})
    assert torch.equal(load_surrogate(tmp_path / "judge.ckpt")(x), model(x))
    backbone = load_backbone(f"surrogate={tmp_path / 'judge.ckpt'}")
    assert backbone.is_surrogate
    assert backbone.name == "surrogate"
    assert backbone.features([photo(), photo()]).shape == (2, 64)


def test_a_stand_in_is_checked_on_the_classes_it_knows(colours, tmp_path):
    """Two pictures of its classes, one of them labelled wrongly, and one of a class that it never saw."""
    model, names = train_surrogate(Manifest(colours), epochs=8, image_size=16, batch_size=8, seed=3)
    header, *rows = colours.read_text().splitlines()
    rows = [rows[0], rows[1].replace("blue", "red"), rows[2].replace("red", "green")]
    (colours.parent / "other.csv").write_text("\n".join([header, *rows]))
    assert count_recognised(model, names, Manifest(colours.parent / "other.csv")) == (1, 2)
    (colours.parent / "green.csv").write_text("\n".join([header, rows[2]]))
    with pytest.raises(ValueError, match="has no object of the classes blue, red"):
        count_recognised(model, names, Manifest(colours.parent / "green.csv"))


def test_a_stand_in_may_see_the_large_objects_alone(colours, tmp_path, capsys):
    header, *rows = colours.read_text().splitlines()
    rows = [row.replace("8,6,30,26", "0,0,12,12") if i % 3 else row for i, row in enumerate(rows)]
    rows = [f"{header},width,height", *(f"{row},40,32" for row in rows)]
    (colours.parent / "sizes.csv").write_text("\n".join(rows))
    arguments = ["surrogate", "--data", str(colours.parent / "sizes.csv"), "--area", "0.2", "1", "--epochs", "1"]
    arguments += ["--check", str(colours), "--size", "16", "--device", "cpu", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "judge.ckpt")]) == 0
    printed = capsys.readouterr().out
    assert "2 classes, 8 pictures" in printed
    assert re.search(r"right on [\d.]+% of the 24 objects of .*boxes\.csv", printed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be 1 or more, got 0"),
        ({"image_size": 20}, "image_size must be a positive multiple of 8, got 20"),
        ({"image_size": 0}, "image_size must be a positive multiple of 8, got 0"),
    ],
)
def test_a_stand_in_that_cannot_be_trained(settings, message, colours):
    with pytest.raises(ValueError, match=message):
        train_surrogate(Manifest(colours), **settings)


def test_a_stand_in_needs_classes(colours, tmp_path):
    text = colours.read_text()
    (colours.parent / "one.csv").write_text(text.replace("red", "blue"))
    with pytest.raises(ValueError, match="has only the class 'blue'"):
        train_surrogate(Manifest(colours.parent / "one.csv"))
    rows = [",".join(line.split(",")[:5]) for line in text.splitlines()]
    (colours.parent / "none.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="has no label"):
        train_surrogate(Manifest(colours.parent / "none.csv"))
