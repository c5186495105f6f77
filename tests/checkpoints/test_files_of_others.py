"""Checkpoints as people have them, by their real names: separate autoencoders and vision towers, wrapped and extended
files, the hub's cache, averages, and files that lack a network."""

import json
import warnings
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
import transformers
from conftest import TINY as CONFIG
from golden_file import noise, parameter

import pbe
from pbe.baselines import WeightFiles
from pbe.checkpoints import seeding
from pbe.checkpoints.clip_layouts import openai_clip
from pbe.checkpoints.formats.opening import CheckpointError, find_checkpoint
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import open_recognised, open_vae
from pbe.checkpoints.surgery import config_of, describe
from pbe.checkpoints.writing import unet_json, vae_json
from pbe.cli.checkpoint import main
from pbe.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import AutoencoderKL, VAEConfig
from pbe.training.initialization import read_vae

VAE = "first_stage_model."
SMALL_CLIP = CLIPConfig(CLIPVisionConfig(64, 2, 1, 14, 28, 96), CLIPTextConfig(64, 1, 1, 50, 9, 96), 40)

SMALL_SD = StableDiffusionConfig(
    unet=UNetConfig(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,)),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    text=CLIPTextConfig(width=768, num_layers=1, vocab_size=50, mlp_width=64),
)


@cache
def seeded_state(config, seed):
    return seeding.seeded_state(config, seed)


@cache
def fill(model_class, config, seed=5):
    with torch.device("meta"):
        model = model_class(config)
    return {name: parameter(name, list(p.shape), seed) for name, p in model.state_dict().items()}


def load(path, **options):
    return pbe.load_model(path, device="cpu", dtype="float32", **options)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def save(path, state, **beside):
    torch.save({"state_dict": state, **beside}, path)
    return path


def vae_state(seed=9):
    return fill(AutoencoderKL, CONFIG.vae, seed)


def averages_of(state):
    copies = {"model_ema." + name.removeprefix("model.").replace(".", ""): x + 1 for name, x in state.items()}
    return copies | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}


def linear_attention(state, prefix):
    """Attention's projections as linear layers, under the names of newer releases of diffusers."""
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    moved = {}
    for name, x in state.items():
        module, _, kind = name.rpartition(".")
        path, _, last = module.rpartition(".")
        if path.startswith(prefix) and path.endswith("mid.attn_1") and last in names:
            name, x = f"{path}.{names[last]}.{kind}", x.flatten(1) if kind == "weight" else x
        moved[name] = x
    return moved


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model.ckpt", seeded_state(CONFIG, 1), pbe=pbe_entry(CONFIG))


# --- autoencoders -----------------------------------------------------------------------------------------


def test_attention_in_diffusers_names_inside_an_original_file(tmp_path):
    state = seeded_state(CONFIG, 1)
    theirs = linear_attention(state, VAE)
    assert theirs[VAE + "decoder.mid.attn_1.to_out.0.weight"].ndim == 2
    assert same(load(save(tmp_path / "a.ckpt", theirs, pbe=pbe_entry(CONFIG))).state_dict(), state)


def diffusers_vae(folder):
    kind = {"_class_name": "AutoencoderKL", "sample_size": 64}
    vae = diffusers.AutoencoderKL.from_config({**vae_json(CONFIG.vae, 64), **kind, "scaling_factor": 0.18215})
    vae.load_state_dict({name: parameter(name, list(x.shape)) for name, x in vae.state_dict().items()})
    vae.save_pretrained(folder)
    return vae


LOSS = {
    "loss.logvar": torch.zeros(()),
    "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(2, 3, 3, 3),
    "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 2, 1, 1),
    "loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4),
}


@pytest.mark.parametrize(
    "make",
    [
        lambda state: {"state_dict": state | LOSS | averages_of(state)},  # as the autoencoder's own training saved it
        lambda state: state,
        lambda state: linear_attention(state, ""),
        lambda state: {"state_dict": {VAE + name: x for name, x in (state | LOSS | averages_of(state)).items()}},
        lambda state: {"vae." + name: x for name, x in state.items()},
        lambda state: {"state_dict": seeded_state(CONFIG, 3) | {VAE + name: x for name, x in state.items()}},
    ],
)
def test_separate_autoencoders(model, tmp_path, make):
    state = vae_state()
    torch.save(make(state), tmp_path / "vae.ckpt")
    config, tensors = read_vae(tmp_path / "vae.ckpt")  # for training's model.vae
    assert config == CONFIG.vae
    assert same(tensors, {VAE + name: x for name, x in state.items()})
    expected = seeded_state(CONFIG, 1) | {VAE + name: x for name, x in state.items()}
    assert same(load(model, vae=tmp_path / "vae.ckpt").state_dict(), expected)


def test_a_diffusers_autoencoder_in_a_folder_or_a_file(model, tmp_path):
    theirs = diffusers_vae(tmp_path / "vae").eval()
    config = json.loads((tmp_path / "vae" / "config.json").read_text()) | {"scaling_factor": 0.7}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    ours = load(tmp_path / "vae")
    assert ours.config == replace(CONFIG.vae, latent_scale=0.7)
    image = noise("image", 1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.moments(image), theirs._encode(image), rtol=1e-4, atol=1e-4)
    out = tmp_path / "out.ckpt"
    with pytest.warns(UserWarning, match=r"latents' scale is 0\.7, that of .*model\.ckpt is 0\.18215"):
        assert main(["set-vae", str(model), str(tmp_path / "vae"), "--out", str(out)]) == 0
    loaded = load(out)
    assert loaded.config.vae.latent_scale == 0.7
    assert same(loaded.vae.state_dict(), ours.state_dict())
    alone = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert same(load(model, vae=alone).vae.state_dict(), ours.state_dict())
    assert describe(open_recognised(alone))["parameters"].keys() == {"VAE", "total"}


def test_a_model_s_scale_holds_for_an_autoencoder_that_does_not_say_its_own(tmp_path):
    config = replace(CONFIG, vae=replace(CONFIG.vae, latent_scale=0.5))
    path = save(tmp_path / "model.ckpt", seeded_state(config, 1), pbe=pbe_entry(config))
    torch.save(vae_state(), tmp_path / "vae.pt")
    assert load(path, vae=tmp_path / "vae.pt").config.vae.latent_scale == 0.5
    assert main(["set-vae", str(path), str(tmp_path / "vae.pt"), "--out", str(tmp_path / "out.ckpt")]) == 0
    assert load(tmp_path / "out.ckpt").config.vae.latent_scale == 0.5


def test_an_autoencoder_for_what_has_none(tmp_path):
    torch.save(vae_state(), tmp_path / "vae.pt")
    torch.save(fill(CLIP, SMALL_CLIP), tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"clip\.pt looks like CLIP, .*has no place for .* first_stage_model\."):
        load(tmp_path / "clip.pt", vae=tmp_path / "vae.pt")
    with pytest.raises(CheckpointError, match=r"clip\.pt holds no autoencoder"):
        open_vae(tmp_path / "clip.pt")


# --- wrapped and extended files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {"_orig_mod." + name: x for name, x in state.items()}},
        lambda state: {"state_dict": {"module." + name: x for name, x in state.items()}},
        lambda state: {"state_dict": {"module._orig_mod." + name: x for name, x in state.items()}},
        lambda state: {"state_dict": {"model." + name: x for name, x in state.items()}},
        lambda state: {
            "state_dict": {n.replace("diffusion_model.", "diffusion_model._orig_mod."): x for n, x in state.items()}
        },
        lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3},
        lambda state: {"module": state, "ds_config": {"steps": 1}},
        lambda state: {"params_ema": state, "params": dict.fromkeys(state, torch.zeros(1))},
        lambda state: {"module." + name: x for name, x in state.items()} | {"n_averaged": torch.tensor(7)},
    ],
)
def test_wrapped_files(tmp_path, wrap):
    state = seeded_state(CONFIG, 1)
    torch.save({**wrap(state), "pbe": pbe_entry(CONFIG)}, tmp_path / "model.ckpt")
    loaded = load(tmp_path / "model.ckpt")
    assert loaded.config == CONFIG
    assert same(loaded.state_dict(), state)


def test_one_name_with_and_without_a_wrapper_s_is_an_error(tmp_path):
    state = seeded_state(CONFIG, 1)
    torch.save(state | {"module.proj_out.bias": state["proj_out.bias"]}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"with and without module\."):
        load(tmp_path / "model.ckpt")


def test_networks_of_a_loss_are_named_and_left_out(tmp_path, capsys):
    state, x = seeded_state(CONFIG, 1), torch.zeros(2, 3, 3, 3)
    beside = {"vgg.slice1.0.weight": x, "vgg.slice1.0.bias": x, "vgg.mean": x, "lpips.lin0.model.1.weight": x}
    path = save(tmp_path / "model.ckpt", state | beside, pbe=pbe_entry(CONFIG), optimizer_states=[{"state": {0: x}}])
    with pytest.warns(UserWarning, match=r"beside Paint by Example, .*: 'vgg' \(3 tensors\), 'lpips' \(1 tensors\)"):
        assert same(load(path).state_dict(), state)
    with pytest.warns(UserWarning, match="left out"):
        assert main(["inspect", str(path)]) == 0
    assert "not loaded: 4 tensors (networks that no model here has)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.control.0.weight", "cond_stage_model.id_proj.0.weight", "ID_proj_out.weight"]
)
def test_unknown_tensors_of_the_model_s_own_are_an_error(tmp_path, name):
    save(tmp_path / "model.ckpt", seeded_state(CONFIG, 1) | {name: torch.zeros(2)}, pbe=pbe_entry(CONFIG))
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (
            VAE,
            r"Diffusion v1, original layout without its autoencoder: `pbe checkpoint set-vae`.*`--vae FILE`",
        ),
        ("cond_stage_model.", r"without its text tower: `pbe checkpoint expand --clip FILE`"),
        ("model.", r"without its UNet"),
        (("cond_stage_model.", VAE), "without its autoencoder and text tower"),
    ],
)
def test_a_lost_network_is_named(tmp_path, lost, message):
    state = {name: x for name, x in fill(StableDiffusion, SMALL_SD).items() if not name.startswith(lost)}
    with pytest.raises(CheckpointError, match=message):
        load(save(tmp_path / "sd.ckpt", state))


def test_what_the_messages_about_lost_networks_say_works(tmp_path):
    whole = seeded_state(CONFIG, 1)
    path = save(
        tmp_path / "no_vae.ckpt", {n: x for n, x in whole.items() if not n.startswith(VAE)}, pbe=pbe_entry(CONFIG)
    )
    with pytest.raises(CheckpointError, match=r"Paint by Example, original layout without its autoencoder"):
        load(path)
    torch.save(vae_state(), tmp_path / "vae.pt")
    expected = whole | {VAE + name: x for name, x in vae_state().items()}
    assert same(load(path, vae=tmp_path / "vae.pt").state_dict(), expected)
    assert main(["set-vae", str(path), str(tmp_path / "vae.pt"), "--out", str(tmp_path / "whole.ckpt")]) == 0
    assert same(load(tmp_path / "whole.ckpt").state_dict(), expected)

    sd = {n: x for n, x in fill(StableDiffusion, SMALL_SD).items() if not n.startswith("cond_stage_model.")}
    save(tmp_path / "no_text.ckpt", sd)
    clip = {f"visual.{n}": x for n, x in openai_state().items() if not n.startswith("text")}
    torch.save(clip | {"input_resolution": torch.tensor(28)}, tmp_path / "clip.pt")
    command = ["expand", str(tmp_path / "no_text.ckpt"), "--clip", str(tmp_path / "clip.pt")]
    assert main([*command, "--out", str(tmp_path / "start.ckpt")]) == 0
    assert load(tmp_path / "start.ckpt").config.exemplar.vision == SMALL_CLIP.vision


# --- CLIP -------------------------------------------------------------------------------------------------


def openai_state(prefix="vision_model."):
    """The vision tower of SMALL_CLIP as `model.visual` of open_clip saves it."""
    state = fill(CLIP, SMALL_CLIP)
    layers = [f"visual.transformer.resblocks.{i}.ln_1" for i in range(2)]
    names = [name for name in state if name.startswith(prefix) or name == "visual_projection.weight"]
    mappings = openai_clip(layers).to_theirs(names)
    return {n.removeprefix("visual."): m.build(*(state[s] for s in m.sources)) for n, m in mappings.items()}


def vision_state():
    state, prefix = fill(CLIP, SMALL_CLIP), "vision_model."
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    "make",
    [
        openai_state,
        lambda: {f"visual.{name}": x for name, x in openai_state().items()} | {"logit_scale": torch.ones(())},
        lambda: {f"vision_model.{name}": x for name, x in vision_state().items()},
        lambda: (
            {f"vision_model.{n}": x for n, x in vision_state().items()}
            | {"visual_projection.weight": torch.zeros(40, 64), "vision_model.embeddings.position_ids": torch.arange(5)}
        ),
        vision_state,
    ],
)
def test_vision_towers_alone(tmp_path, make):
    torch.save(make(), tmp_path / "vision.pt")
    with pytest.warns(UserWarning, match=r"vision\.pt is taken for a CLIP with QuickGELU"):
        tower = load(tmp_path / "vision.pt")
    assert tower.config == SMALL_CLIP.vision
    assert same(tower.state_dict(), vision_state())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("with_head", [False, True])
def test_transformers_vision_towers_start_a_model(tmp_path, activation, with_head):
    kind = transformers.CLIPVisionModelWithProjection if with_head else transformers.CLIPVisionModel
    v = SMALL_CLIP.vision
    sizes = {"hidden_size": v.width, "num_hidden_layers": v.num_layers, "num_attention_heads": 2, "projection_dim": 40}
    sizes |= {"intermediate_size": v.mlp_width, "image_size": v.image_size, "patch_size": v.patch_size}
    theirs = kind(transformers.CLIPVisionConfig(**sizes, hidden_act=activation)).eval()
    theirs.save_pretrained(tmp_path / "clip")
    sd = save(tmp_path / "sd.ckpt", fill(StableDiffusion, SMALL_SD))
    out = tmp_path / "start.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the folder says what it was trained with
        assert main(["expand", str(sd), "--clip", str(tmp_path / "clip"), "--out", str(out)]) == 0
    tower = load(out).cond_stage_model.vision
    assert tower.config == replace(v, num_heads=2, activation=activation)
    image = noise("image", 2, 3, 28, 28)
    with torch.no_grad():
        expected = (theirs.vision_model if with_head else theirs)(image).pooler_output
        torch.testing.assert_close(tower(image), expected, rtol=1e-4, atol=1e-5)


def test_open_clip_s_gelu_is_read_from_its_config_or_doubted(tmp_path):
    config = replace(SMALL_CLIP, text=replace(SMALL_CLIP.text, num_heads=2))
    state = fill(CLIP, config)
    layers = [f"visual.transformer.resblocks.{i}.ln_1" for i in range(2)] + ["transformer.resblocks.0.ln_1"]
    theirs = {n: m.build(*map(state.get, m.sources)) for n, m in openai_clip(layers).to_theirs(state).items()}
    torch.save(theirs, tmp_path / "open_clip_pytorch_model.bin")
    towers = {"vision_cfg": {"layers": 2, "width": 64}, "text_cfg": {"heads": 2, "width": 64}}

    with pytest.warns(UserWarning, match="QuickGELU.* slim --activation"):
        load(tmp_path / "open_clip_pytorch_model.bin")
    for quick, activation in ((False, "gelu"), (True, "quick_gelu")):
        settings = {"model_cfg": {**towers, **({"quick_gelu": True} if quick else {})}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
        vision, text = (replace(tower, activation=activation) for tower in (config.vision, config.text))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(tmp_path).config == CLIPConfig(vision, text, config.embed_dim)
    slim = ["slim", str(tmp_path / "open_clip_pytorch_model.bin"), "--out"]
    assert main([*slim, str(tmp_path / "doubtful.safetensors")]) == 0
    with pytest.warns(UserWarning, match="QuickGELU"):
        load(tmp_path / "doubtful.safetensors")
    assert main([*slim, str(tmp_path / "clip.safetensors"), "--activation", "gelu"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = load(tmp_path / "clip.safetensors")
    assert (clip.config.vision.activation, clip.config.text.activation) == ("gelu", "gelu")


# --- folders ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("given", "level_heads"), [([4, 4], ()), ([4, 2], (4, 2))])
def test_heads_by_level(tmp_path, given, level_heads):
    """diffusers' attention_head_dim counts heads in this family, and may list them by level."""
    config = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0, 1), context_dim=64, num_heads=4
    )
    config = replace(config, level_heads=level_heads)
    theirs = diffusers.UNet2DConditionModel.from_config({**unet_json(config, 8), "attention_head_dim": given}).eval()
    theirs.load_state_dict({name: parameter(name, list(x.shape)) for name, x in theirs.state_dict().items()})
    four = replace(CONFIG, exemplar=replace(CONFIG.exemplar, vision=replace(CONFIG.exemplar.vision, num_layers=4)))
    whole = save(tmp_path / "m.ckpt", seeded_state(replace(four, unet=replace(config, level_heads=())), 1))
    assert main(["convert", str(whole), "--out", str(tmp_path / "folder")]) == 0
    theirs.save_pretrained(tmp_path / "folder" / "unet")
    model = load(tmp_path / "folder")
    assert model.config.unet == config
    x, t, context = noise("x", 2, 9, 8, 8), torch.tensor([3, 600]), noise("c", 2, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.unet(x, t, context), theirs(x, t, context).sample, rtol=1e-4, atol=1e-4)
    assert main(["convert", str(tmp_path / "folder"), "--out", str(tmp_path / "again.ckpt")]) == 0
    assert load(tmp_path / "again.ckpt").config.unet == config


def test_the_hub_s_cache_folder(tmp_path):
    cache = tmp_path / "models--Fantasy-Studio--Paint-by-Example"
    for name in ("0ae45d1", "f1b9c2e"):
        (cache / "snapshots" / name).mkdir(parents=True)
        (cache / "snapshots" / name / "model.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"refs/main .* give one of: .*snapshots/0ae45d1, .*snapshots/f1b9c2e"):
        find_checkpoint(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("f1b9c2e")
    assert find_checkpoint(cache) == cache / "snapshots" / "f1b9c2e"
    (cache / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"no snapshot \.\./\.\./elsewhere"):
        find_checkpoint(cache)
    (cache / "snapshots" / "f1b9c2e" / "model.ckpt").unlink()
    (cache / "snapshots" / "f1b9c2e").rmdir()
    assert find_checkpoint(cache) == cache / "snapshots" / "0ae45d1"
    with pytest.raises(CheckpointError, match=r"give one of the files in it: model\.ckpt"):
        load(cache)


def test_a_folder_that_lacks_a_part_says_which(tmp_path):
    index = {name: ["diffusers", "X"] for name in ("unet", "vae", "image_encoder")}
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks its parts vae, image_encoder, which model_index"):
        load(tmp_path)


# --- averages ---------------------------------------------------------------------------------------------


def test_which_weights_are_used(tmp_path):
    state = seeded_state(CONFIG, 1)
    copies = averages_of({name: x for name, x in state.items() if name.startswith("model.")})
    expected = {name: x + 1 if name.startswith("model.") else x for name, x in state.items()}
    entry = pbe_entry(CONFIG)
    others = save(tmp_path / "others.ckpt", state | copies, pbe=entry)
    ours = save(tmp_path / "ours.ckpt", state | copies, pbe={**entry, "config": {"run": "runs/a"}})
    with pytest.warns(UserWarning, match=r"others\.ckpt: its averages are not used"):
        assert same(load(others).state_dict(), state)
    with pytest.warns(UserWarning, match=r"ours\.ckpt: its averages are used, as in its sample grids"):
        assert same(load(ours).state_dict(), expected)
    for path in (ours, others):
        assert same(load(path, weights="ema").state_dict(), expected)
        assert same(load(path, weights="raw").state_dict(), state)
        assert config_of(open_recognised(path)) == CONFIG
    files = WeightFiles(paint_by_example=ours, device="cpu", dtype="float32", weights="raw")  # of `pbe evaluate run`
    assert same(files.load("paint_by_example", PaintByExample).state_dict(), state)
    with pytest.raises(ValueError, match="weights='mean' is not one of auto, ema, raw"):
        load(ours, weights="mean")
    with pytest.raises(CheckpointError, match="holds no averaged copies"):
        load(save(tmp_path / "plain.ckpt", state, pbe=entry), weights="ema")
