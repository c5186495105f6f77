"""The networks and the whole pipeline agree with diffusers and transformers on the same seeded random weights.

The weights go through a checkpoint file and this library's own converter, so that the tables of names are tested too.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.checkpoints.loading import load_model
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_diffusers
from pbe.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import Condition, PaintByExample, PaintByExampleConfig
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig
from pbe.sampling import NoiseSchedule, guided_eps, leading, plms

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# diffusers' mapper has (CLIP layers + 1) // 5 blocks: 24 narrow layers give the original's five
CONFIG = PaintByExampleConfig(
    unet=UNetConfig(model_channels=32),
    vae=VAEConfig(channels=32),
    exemplar=ExemplarConfig(vision=CLIPVisionConfig(width=64, num_layers=24, num_heads=1, mlp_width=128)),
    resolution=64,
)


@pytest.fixture(scope="module")
def model():
    model = PaintByExample(CONFIG)
    model.load_state_dict(seeded_state(CONFIG, seed=3))
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "diffusers"
    save_diffusers(model.state_dict(), CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    if not hasattr(diffusers.pipelines, "paint_by_example"):
        # since the pipeline moved, diffusers does not find the name that model_index.json gives its encoder
        from diffusers.pipelines.deprecated import paint_by_example

        diffusers.pipelines.paint_by_example = paint_by_example
    pipeline = diffusers.PaintByExamplePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


OPEN = """
import sys
import diffusers
folder, *names = sys.argv[1:]
for name in names:
    pipeline = getattr(diffusers, name).from_pretrained(folder, trust_remote_code=True)
    parts = pipeline.image_encoder, pipeline.scheduler, pipeline.feature_extractor
    print(type(pipeline).__name__, *(type(part).__name__ for part in parts))
try:
    diffusers.DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    print("without:", *str(error).split())
"""


@pytest.mark.slow
def test_the_installed_diffusers_opens_the_folder(folder, tmp_path):
    """Without the two lines of help that the hub's folder needs; where a release needs a word, it says which."""
    command = [sys.executable, "-c", OPEN, str(folder), "DiffusionPipeline", "PaintByExamplePipeline"]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    first, second, *without = run.stdout.splitlines()
    parts = "PaintByExamplePipeline PaintByExampleImageEncoder PNDMScheduler CLIPImageProcessor"
    assert first == second == parts
    assert all("Pass `trust_remote_code=True`" in line for line in without)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_agree(actual, expected, tolerance=1e-4):
    """Largest difference over largest value: float32 rounding through some dozens of layers is about 1e-5."""
    assert actual.shape == expected.shape
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < tolerance


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 77])
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (9, 13)])
def test_unet(model, pipeline, tokens, size):
    x, t, context = draw(2, 9, *size), torch.tensor([1, 734]), draw(2, tokens, 768, seed=1)
    assert_agree(model.unet(x, t, context), pipeline.unet(x, t, encoder_hidden_states=context).sample)


@torch.no_grad()
def test_vae(model, pipeline):
    image, z = draw(2, 3, 64, 48).clamp(-1, 1), draw(2, 4, 8, 6)
    assert_agree(model.vae.moments(image), pipeline.vae.encode(image).latent_dist.parameters)
    assert_agree(model.vae.decode(z), pipeline.vae.decode(z / CONFIG.vae.latent_scale).sample)


@torch.no_grad()
def test_exemplar_encoder(model, pipeline):
    exemplar = draw(2, 3, 224, 224)
    context, null_context = pipeline.image_encoder(exemplar, return_uncond_vector=True)
    assert_agree(model.encode_exemplar(exemplar), context)
    assert torch.equal(model.null_context, null_context)


@torch.no_grad()
@pytest.mark.parametrize(("patch_size", "width"), [(14, 128), (32, 64), (16, 64)])
def test_clip(tmp_path, patch_size, width):
    config = CLIPConfig(
        vision=CLIPVisionConfig(width=width, num_layers=3, num_heads=width // 64, patch_size=patch_size, mlp_width=96),
        text=CLIPTextConfig(width=128, num_layers=3, num_heads=2, vocab_size=200, mlp_width=96),
        embed_dim=48,
    )
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=48,
            vision_config={
                "hidden_size": width,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": width // 64,
                "patch_size": patch_size,
                "projection_dim": 48,
            },
            text_config={
                "hidden_size": 128,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "vocab_size": 200,
                "bos_token_id": 198,
                "eos_token_id": 199,
                "projection_dim": 48,
            },
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu")
    assert isinstance(ours, CLIP)
    assert ours.config == config

    image = draw(2, 3, 224, 224)
    token_ids = torch.tensor([[198, 5, 17, 199, 199, 199], [198, 9, 8, 7, 6, 199]])
    output = theirs(input_ids=token_ids, pixel_values=image)
    assert_agree(ours.vision_model(image), theirs.vision_model(image).pooler_output)
    assert_agree(ours.text_model(token_ids), theirs.text_model(token_ids).last_hidden_state)
    assert_agree(torch.nn.functional.normalize(ours.encode_image(image), dim=-1), output.image_embeds)
    assert_agree(torch.nn.functional.normalize(ours.encode_text(token_ids), dim=-1), output.text_embeds)
    assert_agree(ours(image, token_ids), output.logits_per_image)


@torch.no_grad()
def test_stable_diffusion_folder(tmp_path):
    """A Stable Diffusion folder written by diffusers and transformers gives the same text context and noise."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1
        )
    )
    index = {"_class_name": "StableDiffusionPipeline"}
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        part.eval().save_pretrained(tmp_path / name)
        index[name] = ["transformers" if part is text else "diffusers", type(part).__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    ours = load_model(tmp_path, device="cpu")
    assert isinstance(ours, StableDiffusion)
    assert ours.config.unet.num_heads == 4

    token_ids = torch.tensor([[5, 17, 98]])
    context = text(token_ids).last_hidden_state
    assert_agree(ours.encode_text(token_ids), context)
    x, t = draw(1, 4, 8, 8), torch.tensor([500])
    assert_agree(ours.unet(x, t, context), unet(x, t, encoder_hidden_states=context).sample)
    assert_agree(ours.vae.moments(draw(1, 3, 32, 32)), vae.encode(draw(1, 3, 32, 32)).latent_dist.parameters)


@torch.no_grad()
def test_pipeline(model, pipeline, monkeypatch):
    """The same noise, mask and masked latent give the same picture, to 1e-3 of full scale, after 10 PLMS steps.

    diffusers brings masks to latent size by nearest neighbour and draws the masked latent from the posterior: the mask
    is aligned to 8 pixels, and diffusers is handed this library's posterior mean.
    """
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    exemplar = Image.fromarray(generator.integers(0, 256, (224, 224, 3), dtype=np.uint8))
    repaint = np.zeros((64, 64), np.uint8)
    repaint[16:48, 8:40] = 255
    x_T = draw(1, 4, 8, 8, seed=9)

    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    keep = torch.from_numpy(repaint == 0).float()[None, None]
    clip_pixels = pipeline.feature_extractor(images=exemplar, return_tensors="pt").pixel_values
    condition = model.condition(pixels, keep, clip_pixels)
    # diffusers 0.42 samples with mask 1 = keep too, having inverted the user's white = repaint
    z_0 = plms(guided_eps(model, condition, 5.0), x_T, leading(NoiseSchedule.scaled_linear(), 10))
    ours = (model.vae.decode(z_0) / 2 + 0.5).clamp(0, 1)

    def same_masked_latent(*_, **__):
        return torch.cat([condition.z_masked] * 2)

    def prepare(mask, *_args, **_kwargs):
        latent_mask = torch.nn.functional.interpolate(mask, size=(8, 8))
        return torch.cat([latent_mask] * 2), same_masked_latent()

    monkeypatch.setattr(pipeline, "prepare_mask_latents", prepare)
    theirs = pipeline(
        image=image,
        mask_image=Image.fromarray(repaint),
        example_image=exemplar,
        latents=x_T,
        num_inference_steps=10,
        guidance_scale=5.0,
        output_type="pt",
    ).images
    assert (ours - theirs).abs().max().item() < 1e-3
    # and the edit is a real one: the condition changes the picture by far more than the tolerance
    other = Condition(condition.z_masked, condition.mask, condition.context.flip(-1))
    z_other = plms(guided_eps(model, other, 5.0), x_T, leading(NoiseSchedule.scaled_linear(), 10))
    assert ((model.vae.decode(z_other) / 2 + 0.5).clamp(0, 1) - theirs).abs().max().item() > 1e-2


@torch.no_grad()
def test_round_trip_through_diffusers_is_bit_exact(model, pipeline, folder, tmp_path):
    """Our folder, opened and saved again by diffusers under its own newest names, holds the same numbers."""
    for path in (folder, tmp_path / "again"):
        if path != folder:
            pipeline.save_pretrained(path)
        loaded = load_model(path, device="cpu", dtype="float32")
        assert loaded.config == CONFIG
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            assert torch.equal(theirs[name], tensor), name
