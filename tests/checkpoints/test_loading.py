"""From files in every layout to models: recognised, sized, strict, converted tensor by tensor."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TINY as CONFIG
from golden_file import noise, parameter

import pbe
from pbe.checkpoints.clip_layouts import openai_clip
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import (
    DTYPES,
    check_names_and_shapes,
    choose_device,
    choose_dtype,
    has_native_bfloat16,
    hints_of,
    recognise,
)
from pbe.checkpoints.seeding import seeded_checkpoint, seeded_state
from pbe.checkpoints.surgery import config_of
from pbe.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig
from pbe.sampling.schedule import NoiseSchedule

MANIFESTS = Path(__file__).parents[3] / "shared" / "reference" / "manifests"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
POST_QUANT = "first_stage_model.post_quant_conv.weight"
ATTENTION_NORM = "model.diffusion_model.input_blocks.1.1.norm.weight"
VIT_B = {
    "vision": CLIPVisionConfig(width=768, num_layers=12, num_heads=12, patch_size=32, mlp_width=3072),
    "text": CLIPTextConfig(width=512, num_layers=12, num_heads=8, mlp_width=2048),
    "embed_dim": 512,
}
SMALL_SD = StableDiffusionConfig(
    unet=UNetConfig(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,)),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    text=CLIPTextConfig(width=768, num_layers=1, vocab_size=50, mlp_width=64),
)


class Described(NamedTuple):
    """A tensor of which only the description is known."""

    shape: torch.Size
    dtype: torch.dtype


def fill(model_class, config, seed=5):
    with torch.device("meta"):
        model = model_class(config)
    return {name: parameter(name, list(p.shape), seed) for name, p in model.state_dict().items()}


@pytest.mark.parametrize(
    ("manifest", "layout", "config"),
    [
        ("paint-by-example-model.ckpt", "Paint by Example, original layout", PaintByExampleConfig()),
        ("stable-diffusion-v1-4.ckpt", "Stable Diffusion v1, original layout", StableDiffusionConfig()),
        ("stable-diffusion-v1-4-full-ema.ckpt", "Stable Diffusion v1, original layout", StableDiffusionConfig()),
        (
            "stable-diffusion-v1-5-inpainting.ckpt",
            "Stable Diffusion v1, original layout",
            StableDiffusionConfig(unet=UNetConfig()),
        ),
        ("openai-clip-ViT-L-14.pt", "CLIP, OpenAI's layout", CLIPConfig()),
        ("openai-clip-ViT-B-32.pt", "CLIP, OpenAI's layout", CLIPConfig(**VIT_B)),
        (
            "openai-clip-ViT-B-16.pt",
            "CLIP, OpenAI's layout",
            CLIPConfig(**VIT_B | {"vision": CLIPVisionConfig(768, 12, 12, 16, mlp_width=3072)}),
        ),
    ],
)
def test_original_files_are_recognised_and_fit(manifest, layout, config):
    """Every key of the released files is used, or dropped for a listed reason, and none is missing."""
    path = MANIFESTS / f"{manifest}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    entries = json.loads(path.read_text()).items()
    tensors = {name: Described(torch.Size(shape), getattr(torch, dtype)) for name, (shape, dtype) in entries}
    checkpoint = recognise(Checkpoint(path, "manifest", tensors, {}))
    assert checkpoint.layout.name == layout
    assert config_of(checkpoint) == config  # raises where a name or a shape does not fit


def test_defaults_are_the_released_sizes():
    with torch.device("meta"):
        model = PaintByExample(PaintByExampleConfig())
    millions = {name: sum(p.numel() for p in net.parameters()) / 1e6 for name, net in model.named_children()}
    assert millions["model"] == pytest.approx(859.54, abs=0.01)
    assert millions["first_stage_model"] == pytest.approx(83.65, abs=0.01)


def test_original_checkpoint_loads_with_the_same_numbers(tmp_path):
    checkpoint = seeded_checkpoint("small", seed=1)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    model = pbe.load_model(tmp_path / "model.ckpt", device="cpu")
    assert isinstance(model, PaintByExample)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][name]), name
    assert torch.equal(checkpoint["state_dict"]["alphas_cumprod"], NoiseSchedule.scaled_linear().alpha_bar.float())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_converts_to_the_asked_precision(tmp_path, dtype):
    torch.save({"state_dict": seeded_state(CONFIG, 2), "pbe": pbe_entry(CONFIG)}, tmp_path / "model.ckpt")
    model = pbe.load_model(tmp_path / "model.ckpt", device="cpu", dtype=dtype)
    expected = DTYPES.get(dtype, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    full = pbe.load_model(tmp_path / "model.ckpt", device="cpu").state_dict()
    for name, p in model.state_dict().items():
        assert torch.equal(p, full[name].to(expected)), name


def test_training_a_mapped_model_leaves_the_file_alone(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": seeded_state(CONFIG, 2), "pbe": pbe_entry(CONFIG)}, path)
    before = path.read_bytes()
    model = pbe.load_model(path, device="cpu")
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.proj_out.weight.zero_()
    assert path.read_bytes() == before
    assert pbe.load_model(path, device="cpu").proj_out.weight.abs().sum() > 0


def test_entry_tells_what_shapes_cannot(tmp_path):
    config = PaintByExampleConfig(
        unet=UNetConfig(
            model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=4, context_dim=24
        ),
        vae=VAEConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, latent_scale=0.7),
        exemplar=replace(CONFIG.exemplar, tokens="all"),
        resolution=96,
    )
    torch.save({"state_dict": seeded_state(config, 0), "pbe": pbe_entry(config)}, tmp_path / "model.ckpt")
    assert pbe.load_model(tmp_path / "model.ckpt", device="cpu").config == config


def test_stable_diffusion_with_either_text_tower_naming(tmp_path):
    state = fill(StableDiffusion, SMALL_SD)
    renamed = {name.replace(".transformer.text_model.", ".transformer."): x for name, x in state.items()}
    for tensors in (state, renamed):
        torch.save({"state_dict": tensors}, tmp_path / "sd.ckpt")
        model = pbe.load_model(tmp_path / "sd.ckpt", device="cpu")
        assert isinstance(model, StableDiffusion)
        assert model.config == SMALL_SD
        with torch.no_grad():
            context = model.encode_text(torch.tensor([[3, 4, 49]]))
            assert model.unet(noise("z", 1, 4, 6, 6), torch.tensor([9]), context).shape == (1, 4, 6, 6)


def test_what_fine_tunes_leave_behind_is_dropped(tmp_path):
    state = fill(StableDiffusion, SMALL_SD)
    flat = "first_stage_model.encoder.mid.attn_1.q.weight"
    litter = ("scale_factor", "sigmas", "denoiser.log_sigmas", "cond_stage_model.model.logit_scale", "lvlb_weights")
    torch.save(state | dict.fromkeys(litter, torch.ones(3)) | {flat: state[flat][:, :, 0, 0]}, tmp_path / "sd.ckpt")
    loaded = pbe.load_model(tmp_path / "sd.ckpt", device="cpu").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_averages_alone_are_named_as_such(tmp_path):
    torch.save({"model_ema.diffusion_modelout2bias": torch.ones(4)}, tmp_path / "ema.ckpt")
    with pytest.raises(CheckpointError, match="averaged copies without the parameters"):
        pbe.load_model(tmp_path / "ema.ckpt", device="cpu")


DISTILLED = {"sampler": "lcm", "steps": 4, "guidance": 1.0}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"unet_heads": "8"}, "'pbe' says unet_heads must be a whole number from 1 to 65536, got '8'"),
        ({"unet_heads": -1}, "unet_heads must be .* from 1 to 65536, got -1"),
        ({"unet_heads": 7}, "sizes: .* do not divide into num_heads=7"),
        ({"resolution": 0}, "resolution must be .* from 1 to 65536, got 0"),
        ({"latent_scale": [1]}, r"latent_scale must be a number above 0 .*, got \[1\]"),
        ({"latent_scale": float("nan")}, "latent_scale must be a number above 0 .*, got nan"),
        ({"exemplar_tokens": "some"}, "exemplar_tokens must be 'class' or 'all', got 'some'"),
        ({"distilled": "lcm"}, "distilled='lcm' is not a mapping of sampler, steps, guidance"),
        (
            {"distilled": {"sampler": "lcm", "steps": 4}},
            "distilled={'sampler': 'lcm', 'steps': 4} is not a mapping of sampler, steps, guidance",
        ),
        ({"distilled": {**DISTILLED, "sampler": "plms"}}, "distilled.sampler must be 'lcm' or 'tcd', got 'plms'"),
        ({"distilled": {**DISTILLED, "sampler": ["lcm"]}}, r"distilled.sampler must be 'lcm' or 'tcd', got \['lcm'\]"),
        ({"distilled": {**DISTILLED, "steps": True}}, "distilled.steps must be a whole number from 1 to 50, got True"),
        ({"distilled": {**DISTILLED, "steps": 51}}, "distilled.steps must be a whole number from 1 to 50, got 51"),
        (
            {"distilled": {**DISTILLED, "guidance": float("nan")}},
            "distilled.guidance must be a number from 0 .* got nan",
        ),
        ({"distilled": {**DISTILLED, "guidance": -1}}, "distilled.guidance must be a number from 0 .*, got -1"),
    ],
)
def test_an_impossible_entry_is_named(tmp_path, entry, message):
    torch.save({"state_dict": seeded_state(CONFIG, 0), "pbe": pbe_entry(CONFIG) | entry}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=rf"model\.ckpt.* {message}"):
        pbe.load_model(tmp_path / "model.ckpt", device="cpu")


def test_a_folder_of_another_family_is_named():
    checkpoint = Checkpoint(Path("xl"), "made up", {}, {"configs": {"unet": {"attention_head_dim": [[5], 10, 20]}}})
    message = (
        r"xl: its config\.json says level_heads must be a list of whole numbers, one per level, got \[\[5\], 10, 20\]"
    )
    with pytest.raises(CheckpointError, match=message):
        hints_of(checkpoint)
    tensors = {name: Described(x.shape, x.dtype) for name, x in seeded_state(CONFIG, 0).items()}
    checkpoint = recognise(Checkpoint(Path("xl"), "made up", tensors, {"pbe": {"level_heads": [5, 10, 20]}}))
    with pytest.raises(CheckpointError, match=r"\(5, 10, 20\) must be one number for each of \(1, 2\)"):
        config_of(checkpoint)


def test_heads_of_a_clip_folder_come_from_its_config(tmp_path):
    config = CLIPConfig(CLIPVisionConfig(48, 1, 3, 32, mlp_width=96), CLIPTextConfig(64, 1, 2, 9, mlp_width=96), 8)
    towers = {"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(towers))
    torch.save(fill(CLIP, config), tmp_path / "pytorch_model.bin")
    assert pbe.load_model(tmp_path, device="cpu").config == config


def test_openai_clip_and_our_clip_agree(tmp_path):
    """OpenAI's fused and transposed tensors give the model they were made from."""
    config = CLIPConfig(
        vision=CLIPVisionConfig(width=64, num_layers=2, num_heads=1, patch_size=32, mlp_width=96),
        text=CLIPTextConfig(width=128, num_layers=3, num_heads=2, vocab_size=70, mlp_width=96),
        embed_dim=40,
    )
    ours = CLIP(config)
    ours.load_state_dict(fill(CLIP, config))
    layers = [f"visual.transformer.resblocks.{i}.ln_1" for i in range(2)]
    layers += [f"transformer.resblocks.{i}.ln_1" for i in range(3)]
    mappings = openai_clip(layers).to_theirs(ours.state_dict())
    state = ours.state_dict()
    theirs = {name: m.build(*(state[s] for s in m.sources)) for name, m in mappings.items()}
    assert theirs["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * 64, 64)
    assert theirs["visual.proj"].shape == (64, 40)
    torch.save(theirs | {"input_resolution": torch.tensor(224)}, tmp_path / "clip.pt")
    loaded = pbe.load_model(tmp_path / "clip.pt", device="cpu")
    assert loaded.config == config
    found = loaded.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


def test_strictness_lists_every_fault(tmp_path):
    state = seeded_state(CONFIG, 0)
    del state["proj_out.bias"]
    state["cond_stage_model.final_ln.weight"] = torch.zeros(7)
    state["model.diffusion_model.extra"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError) as caught:
        pbe.load_model(tmp_path / "bad.ckpt", device="cpu")
    message = str(caught.value)
    for fault in ("bad.ckpt", "proj_out.bias", "final_ln.weight (7,) for (64,)", "model.diffusion_model.extra"):
        assert fault in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"weight": torch.zeros(2)}, "fits no known model"),
        (lambda s: s | {"surprise.weight": torch.zeros(2)}, "surprise.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "model.diffusion_model.out.2.weight"}, "out.2.weight"),
        # by this one a block might be told to have no attention
        (lambda s: {k: v for k, v in s.items() if k != ATTENTION_NORM}, rf"lacks 1: {re.escape(ATTENTION_NORM)}$"),
        (lambda s: s | {FIRST: torch.zeros(3)}, r"model\.ckpt looks like Paint by Example, .* sizes: "),
        (lambda s: s | {FIRST: torch.zeros(0, 9, 3, 3)}, r"model\.ckpt looks like Paint by Example, .* sizes: "),
        (lambda s: s | {POST_QUANT: torch.zeros(())}, r"model\.ckpt looks like Paint by Example, .* sizes: "),
        (lambda s: s | {"proj_out.bias": s["proj_out.bias"].to(torch.int8)}, r"in 1: proj_out\.bias \(torch\.int8\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    torch.save({"state_dict": change(seeded_state(CONFIG, 0))}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=message):
        pbe.load_model(tmp_path / "model.ckpt", device="cpu")


def test_clip_with_another_activation_is_refused(tmp_path):
    state = fill(CLIP, CLIPConfig(CLIPVisionConfig(64, 1, 1, 32), CLIPTextConfig(64, 1, 1, 9), 8))
    torch.save(state, tmp_path / "pytorch_model.bin")
    for vision, text, named in (("relu", "relu", "'relu'"), ("gelu", "quick_gelu", "'quick_gelu'")):
        towers = {"vision_config": {"hidden_act": vision}, "text_config": {"hidden_act": text}}
        (tmp_path / "config.json").write_text(json.dumps(towers))
        with pytest.raises(CheckpointError, match=rf"hidden_act={named}; expected 'quick_gelu' or 'gelu' in both"):
            pbe.load_model(tmp_path, device="cpu")


def test_wrong_devices_and_precisions():
    with pytest.raises(ValueError, match="'gpu'"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        choose_device("cuda:99")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"'half'.*float16"):
        choose_dtype("half", torch.device("cpu"))
    with pytest.raises(ValueError, match="int64"):
        choose_dtype(torch.int64, torch.device("cpu"))
    with pytest.raises(ValueError, match="'stored'"):
        choose_dtype("stored", torch.device("cpu"))


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_what_the_device_computes_fast(monkeypatch, native):
    monkeypatch.setattr("pbe.checkpoints.loading.has_native_bfloat16", lambda: native)
    expected = {"cuda": torch.float16, "mps": torch.float32, "cpu": torch.bfloat16 if native else torch.float32}
    assert {device: choose_dtype("auto", torch.device(device)) for device in expected} == expected
    assert pbe.load_model("demo", device="cpu").dtype == expected["cpu"]


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
    ],
)
def test_native_bfloat16_is_what_torch_says_of_the_processor(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_native_bfloat16() is native
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert has_native_bfloat16() is False
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch
    assert has_native_bfloat16() is False


def test_stored_precision_is_the_file_s_layer_by_layer(tmp_path):
    state = seeded_state(CONFIG, 2)
    state["proj_out.weight"] = state["proj_out.weight"].half()
    torch.save({"state_dict": state, "pbe": pbe_entry(CONFIG)}, tmp_path / "model.ckpt")
    loaded = pbe.load_model(tmp_path / "model.ckpt", device="cpu", dtype="stored").state_dict()
    assert {name: p.dtype for name, p in loaded.items()} == {name: p.dtype for name, p in state.items()}


def test_shapes_that_contradict_each_other(tmp_path):
    tensors = {name: Described(x.shape, x.dtype) for name, x in seeded_state(CONFIG, 0).items()}
    checkpoint = recognise(Checkpoint(tmp_path, "made up", tensors, {}))
    with pytest.raises(CheckpointError, match="has no place for"):
        check_names_and_shapes(checkpoint, {})
