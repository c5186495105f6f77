"""Operations on checkpoints, as functions and through `pbe checkpoint`."""

import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from conftest import TINY as CONFIG
from golden_file import noise, parameter

import pbe
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import open_recognised
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.surgery import FIRST_CONVOLUTION, config_of, expand
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.checkpoint import main
from pbe.io.atomic import replacing
from pbe.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.paint_by_example import Distilled, PaintByExample
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from pbe.models.unet import UNet, UNetConfig
from pbe.models.vae import VAEConfig

UNET = UNetConfig(in_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,))
SD = StableDiffusionConfig(
    unet=UNET,
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    text=CLIPTextConfig(width=64, num_layers=1, num_heads=1, vocab_size=50, mlp_width=64),
)


def fill(model_class, config, seed=5):
    with torch.device("meta"):
        model = model_class(config)
    return {name: parameter(name, list(p.shape), seed) for name, p in model.state_dict().items()}


def write(path, state, **extras):
    torch.save({"state_dict": state, **extras}, path)
    return path


def unet_of(tensors, in_channels):
    unet = UNet(UNetConfig(**{**UNET.__dict__, "in_channels": in_channels}))
    prefix = "model.diffusion_model."
    unet.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return unet


@pytest.fixture
def sd(tmp_path):
    return write(tmp_path / "sd.ckpt", fill(StableDiffusion, SD))


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.ckpt", seeded_state(CONFIG, 1), pbe=pbe_entry(CONFIG), optimizer_states=[{"a": 1}])


@torch.no_grad()
def test_expanded_stable_diffusion_computes_what_it_did(sd):
    tensors = expand(open_recognised(sd))
    z_t, t, context = noise("z_t", 2, 4, 8, 8), torch.tensor([3, 600]), noise("c", 2, 5, 768)
    anything = 1e3 * noise("anything", 2, 5, 8, 8)
    before = unet_of(fill(StableDiffusion, SD), 4)(z_t, t, context)
    after = unet_of(tensors, 9)(torch.cat([z_t, anything], dim=1), t, context)
    assert torch.equal(before, after)


@torch.no_grad()
def test_expanded_inpainting_model_takes_our_order_and_polarity(tmp_path):
    """(z_t, mask, z_masked), 1 = repaint, becomes (z_t, z_masked, mask), 1 = keep; exact but for the border, where zero
    padding means "keep" to the one and "repaint" to the other."""
    inpainting = StableDiffusionConfig(unet=UNetConfig(**{**UNET.__dict__, "in_channels": 9}), vae=SD.vae, text=SD.text)
    state = fill(StableDiffusion, inpainting)
    tensors = expand(open_recognised(write(tmp_path / "inpainting.ckpt", state)))
    z_t, z_masked = noise("z_t", 1, 4, 12, 12), noise("z_masked", 1, 4, 12, 12)
    repaint = (noise("mask", 1, 1, 12, 12) > 0).float()
    convolutions = []
    for t, x in (
        (state, torch.cat([z_t, repaint, z_masked], dim=1)),
        (tensors, torch.cat([z_t, z_masked, 1 - repaint], dim=1)),
    ):
        weight, bias = t[f"{FIRST_CONVOLUTION}.weight"], t[f"{FIRST_CONVOLUTION}.bias"]
        convolutions.append(torch.nn.functional.conv2d(x, weight, bias, padding=1))
    theirs, ours = convolutions
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(theirs[inside], ours[inside], atol=1e-5)
    assert not torch.allclose(theirs, ours, atol=1e-2)


def test_expand_is_not_applied_twice(sd, tmp_path, capsys):
    out = tmp_path / "nine.safetensors"
    assert main(["expand", str(sd), "--out", str(out)]) == 0
    assert main(["expand", str(out), "--out", str(tmp_path / "again.ckpt")]) == 2
    assert "already" in capsys.readouterr().err


def test_expand_with_clip_gives_a_model_to_train(sd, tmp_path):
    clip = CLIPConfig(CLIPVisionConfig(64, 1, 1, 32, mlp_width=64), CLIPTextConfig(64, 1, 1, 9, mlp_width=64), 8)
    clip_path = write(tmp_path / "clip.pt", fill(CLIP, clip))
    for seed, out in ((0, "a.ckpt"), (0, "b.ckpt"), (1, "c.ckpt")):
        args = ["expand", str(sd), "--clip", str(clip_path), "--seed", str(seed), "--out", str(tmp_path / out)]
        assert main(args) == 0
    a, b, c = (pbe.load_model(tmp_path / out, device="cpu") for out in ("a.ckpt", "b.ckpt", "c.ckpt"))
    assert isinstance(a, PaintByExample)
    assert a.config.unet.in_channels == 9
    expected = fill(CLIP, clip)["vision_model.embeddings.class_embedding"]
    assert torch.equal(a.cond_stage_model.vision.embeddings.class_embedding, expected)
    assert torch.equal(a.learnable_vector, b.learnable_vector)
    assert not torch.equal(a.learnable_vector, c.learnable_vector)
    with torch.no_grad():
        assert a.encode_exemplar(noise("exemplar", 1, 3, 224, 224)).std() > 0.1


def test_slim_drops_all_but_the_networks(model, tmp_path):
    out = tmp_path / "slim.safetensors"
    assert main(["slim", str(model), "--out", str(out), "--dtype", "float16"]) == 0
    slim = open_recognised(out)
    assert {slim.dtype(name) for name in slim.mappings} == {torch.float16}
    assert "optimizer_states" not in slim.file.extras
    assert pbe.load_model(out, device="cpu").config == CONFIG
    assert out.stat().st_size < 0.55 * model.stat().st_size


def test_extract_ema(tmp_path):
    state = seeded_state(CONFIG, 1)
    ema = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in state.items()
        if name.startswith("model.")
    }
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    path = write(tmp_path / "ema.ckpt", state | ema | counters, pbe=pbe_entry(CONFIG))
    assert main(["extract-ema", str(path), "--out", str(tmp_path / "averaged.ckpt")]) == 0
    averaged = pbe.load_model(tmp_path / "averaged.ckpt", device="cpu").state_dict()
    for name, tensor in state.items():
        assert torch.equal(averaged[name], tensor + 1 if name.startswith("model.") else tensor), name

    del ema["model_ema.diffusion_modelout2bias"]
    path = write(tmp_path / "cut.ckpt", state | ema, pbe=pbe_entry(CONFIG))
    assert main(["extract-ema", str(path), "--out", str(tmp_path / "cut-averaged.ckpt")]) == 2
    assert not (tmp_path / "cut-averaged.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_what_a_model_was_distilled_for_is_kept(tmp_path, sampler):
    config = replace(four_layers(), distilled=Distilled(sampler, 4, 1.0))
    names = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in seeded_state(config, 1)}
    state = seeded_state(config, 1)
    averages = {ema: state[name] for name, ema in names.items() if name.startswith("model.")}
    path = write(tmp_path / "model.ckpt", state | averages, pbe=pbe_entry(config))
    commands = [
        ["slim", "slim.safetensors"],
        ["extract-ema", "averaged.ckpt"],
        ["convert", "converted.safetensors"],
        ["convert", "folder"],
        ["set-vae", "vae.ckpt", str(path)],
        ["merge", "merged.ckpt", str(path), "--weights", "0.5", "0.5"],
    ]
    for command, out, *more in commands:
        assert main([command, str(path), *more, "--out", str(tmp_path / out)]) == 0
        assert config_of(open_recognised(tmp_path / out)) == config, command
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", f"{sampler.upper()}Scheduler"]
    again = tmp_path / "again.ckpt"
    assert main(["convert", str(tmp_path / "folder"), "--out", str(again)]) == 0
    assert config_of(open_recognised(again)) == config


def test_a_distilled_model_is_not_merged_with_an_ordinary_one(model, tmp_path, capsys):
    config = replace(CONFIG, distilled=Distilled("lcm", 4, 1.0))
    other = write(tmp_path / "other.ckpt", seeded_state(config, 2), pbe=pbe_entry(config))
    assert main(["merge", str(model), str(other), "--weights", "0.5", "0.5", "--out", str(tmp_path / "no.ckpt")]) == 2
    assert "or was distilled otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_convert_is_bit_exact(model, tmp_path, suffix):
    out = tmp_path / f"converted{suffix}"
    assert main(["convert", str(model), "--out", str(out)]) == 0
    assert main(["diff", str(model), str(out)]) == 0
    assert open_recognised(out).file.extras["pbe"] == pbe_entry(CONFIG)


def test_convert_refuses_what_diffusers_cannot_hold(model, tmp_path, capsys):
    assert main(["convert", str(model), "--out", str(tmp_path / "folder")]) == 2
    assert "mapper blocks" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_diff_finds_the_one_changed_tensor(model, tmp_path, capsys):
    state = seeded_state(CONFIG, 1)
    state["proj_out.bias"][3] += 0.25
    other = write(tmp_path / "other.ckpt", state, pbe=pbe_entry(CONFIG))
    assert main(["diff", str(model), str(other)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "proj_out.bias: values, largest difference 0.25",
        "1 tensors differ",
    ]
    assert main(["diff", str(model), str(other), "--tolerance", "0.3"]) == 0


def test_diff_sees_nan_and_infinity(tmp_path, capsys):
    state = seeded_state(CONFIG, 1)
    state["proj_out.bias"][0] = float("nan")
    state["proj_out.bias"][1] = float("inf")
    a = write(tmp_path / "a.ckpt", state, pbe=pbe_entry(CONFIG))
    assert main(["diff", str(a), str(a)]) == 0
    state["proj_out.bias"][0] = 1.0
    b = write(tmp_path / "b.ckpt", state, pbe=pbe_entry(CONFIG))
    assert main(["diff", str(a), str(b)]) == 1
    assert "inf" in capsys.readouterr().out


def test_merge(model, tmp_path, capsys):
    other = write(tmp_path / "other.ckpt", seeded_state(CONFIG, 2), pbe=pbe_entry(CONFIG))
    out = tmp_path / "merged.ckpt"
    assert main(["merge", str(model), str(other), "--weights", "0.25", "0.75", "--out", str(out)]) == 0
    a, b, merged = seeded_state(CONFIG, 1), seeded_state(CONFIG, 2), pbe.load_model(out, device="cpu").state_dict()
    for name in a:
        assert torch.allclose(merged[name], 0.25 * a[name] + 0.75 * b[name], atol=1e-6), name
    for wrong in ("0.5", "nan"):
        assert main(["merge", str(model), "--weights", wrong, "--out", str(out), "--force"]) == 2
        assert "add up to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["seed", "--seed", "-1", "--out", "out.ckpt"], "--seed must be between 0 and"),
        (["seed", "--seed", str(2**64), "--out", "out.ckpt"], f"got {2**64}"),
        # before the checkpoint, which is not there, is opened
        (["expand", "none.ckpt", "--seed", "-1", "--out", "out.ckpt"], "--seed must be between 0 and"),
        (["slim", "none.ckpt", "--out", "out.zip"], "name must end in .safetensors, .ckpt"),
    ],
)
def test_wrong_values_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, command, message):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_set_vae(model, tmp_path, capsys):
    entry = {**pbe_entry(CONFIG), "latent_scale": 0.7}
    other = write(tmp_path / "other.ckpt", seeded_state(CONFIG, 2), pbe=entry)
    out = tmp_path / "out.ckpt"
    assert main(["set-vae", str(model), str(other), "--out", str(out)]) == 0
    a, b = seeded_state(CONFIG, 1), seeded_state(CONFIG, 2)
    loaded = pbe.load_model(out, device="cpu")
    assert loaded.config.vae.latent_scale == 0.7
    for name, x in loaded.state_dict().items():
        assert torch.equal(x, (b if name.startswith("first_stage_model.") else a)[name]), name

    vae = replace(CONFIG.vae, num_res_blocks=2)
    odd = replace(CONFIG, vae=vae)
    odd = write(tmp_path / "odd.ckpt", seeded_state(odd, 1), pbe=pbe_entry(odd))
    assert main(["set-vae", str(model), str(odd), "--out", str(out), "--force"]) == 2
    assert "the autoencoder has other sizes than that of" in capsys.readouterr().err


def test_merge_refuses_another_architecture(model, sd, tmp_path, capsys):
    out = tmp_path / "merged.ckpt"
    assert main(["merge", str(model), str(sd), "--weights", "0.5", "0.5", "--out", str(out)]) == 2
    assert "sd.ckpt" in capsys.readouterr().err
    assert not out.exists()


def test_merge_refuses_another_order_of_inputs(sd, tmp_path, capsys):
    """An expanded model and SD-inpainting have the same shapes, and mean different things by them."""
    inpainting = StableDiffusionConfig(unet=UNetConfig(**{**UNET.__dict__, "in_channels": 9}), vae=SD.vae, text=SD.text)
    write(tmp_path / "inpainting.ckpt", fill(StableDiffusion, inpainting))
    assert main(["expand", str(sd), "--out", str(tmp_path / "expanded.ckpt")]) == 0
    paths = [str(tmp_path / name) for name in ("expanded.ckpt", "inpainting.ckpt", "merged.ckpt")]
    assert main(["merge", *paths[:2], "--weights", "0.5", "0.5", "--out", paths[2]]) == 2
    assert "pbe checkpoint expand" in capsys.readouterr().err


def test_folders_that_are_no_checkpoint_are_never_replaced(model, tmp_path, capsys):
    precious = tmp_path / "precious.ckpt"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for command in (["slim", str(model)], ["convert", str(model)]):
        for out in (precious, tmp_path):
            assert main([*command, "--out", str(out), "--force"]) == 2
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert model.exists()


def four_layers():
    """A config that diffusers can express: one mapper block for four CLIP layers."""
    return replace(CONFIG, exemplar=replace(CONFIG.exemplar, vision=replace(CONFIG.exemplar.vision, num_layers=4)))


@pytest.mark.slow
def test_a_diffusers_folder_is_replaced_whole(tmp_path):
    config = four_layers()
    path = write(tmp_path / "model.ckpt", seeded_state(config, 1), pbe=pbe_entry(config))
    other = write(tmp_path / "other.ckpt", seeded_state(config, 2), pbe=pbe_entry(config))
    folder = tmp_path / "v1.1"  # a dot makes no suffix
    assert main(["convert", str(path), "--out", str(folder)]) == 0
    assert main(["convert", str(other), "--out", str(folder)]) == 2
    assert main(["diff", str(path), str(folder)]) == 0
    assert main(["convert", str(other), "--out", str(folder), "--force"]) == 0
    assert main(["diff", str(other), str(folder)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.ckpt", "other.ckpt", "v1.1"]


def test_half_precision_variant_of_a_folder(tmp_path):
    path = write(tmp_path / "model.ckpt", seeded_state(four_layers(), 1), pbe=pbe_entry(four_layers()))
    assert main(["convert", str(path), "--out", str(tmp_path / "folder")]) == 0
    for file in (tmp_path / "folder").rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert main(["diff", str(path), str(tmp_path / "folder")]) == 0


def test_inspect(model, capsys):
    assert main(["inspect", str(model)]) == 0
    report = capsys.readouterr().out
    for words in ("Paint by Example, original layout", "model_channels=32", "optimizer: yes", "averaged copies: no"):
        assert words in report


def test_existing_files_are_kept_unless_forced(model, tmp_path, capsys):
    out = tmp_path / "out.ckpt"
    out.write_bytes(b"precious")
    assert main(["slim", str(model), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert main(["slim", str(model), "--out", str(out), "--force"]) == 0
    assert pbe.load_model(out, device="cpu").config == CONFIG


def test_a_file_can_be_slimmed_onto_itself(model):
    assert main(["slim", str(model), "--out", str(model), "--force"]) == 0
    loaded = pbe.load_model(model, device="cpu").state_dict()
    for name, tensor in seeded_state(CONFIG, 1).items():
        assert torch.equal(loaded[name], tensor), name


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "out.ckpt").write_bytes(b"precious")

    def fail_halfway():
        with replacing(tmp_path / "out.ckpt", overwrite=True) as part:
            part.write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk"):
        fail_halfway()
    assert [p.name for p in tmp_path.iterdir()] == ["out.ckpt"]
    assert (tmp_path / "out.ckpt").read_bytes() == b"precious"


def test_only_what_is_needed_is_saved(tmp_path):
    """A part of a large tensor is saved by itself, not with the storage that it looks into."""
    large = torch.zeros(1000, 1000)
    save_checkpoint({"part": large[0]}, tmp_path / "part.ckpt", {})
    assert (tmp_path / "part.ckpt").stat().st_size < 20_000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_get_the_usual_permissions(model, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    main(["convert", str(model), "--out", str(tmp_path / "model.safetensors")])
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.slow
def test_seeded_checkpoints(tmp_path, capsys):
    for out, seed in (("a.ckpt", "3"), ("b.ckpt", "3"), ("c.ckpt", "4")):
        assert main(["seed", "--out", str(tmp_path / out), "--seed", seed]) == 0
    assert main(["diff", str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]) == 0
    assert main(["diff", str(tmp_path / "a.ckpt"), str(tmp_path / "c.ckpt")]) == 1
    with pytest.raises(SystemExit):
        main(["seed", "--out", str(tmp_path / "d.ckpt"), "--size", "huge"])


def test_json_entry_survives_in_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    save_checkpoint({"x": torch.ones(2)}, tmp_path / "x.safetensors", {"trained_on": "Ünïcode", "n": 3})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert json.loads(file.metadata()["pbe"]) == {"trained_on": "Ünïcode", "n": 3}
