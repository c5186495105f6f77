"""`pbe checkpoint merge`: weighted sums, differences that are added, and what overflows float16."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY

import pbe
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import open_recognised
from pbe.checkpoints.seeding import draw, seeded_state
from pbe.checkpoints.surgery import FIRST_CONVOLUTION, OUR_INPUTS
from pbe.cli.checkpoint import main
from pbe.models.clip import CLIPTextConfig
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig

KERNEL = f"{FIRST_CONVOLUTION}.weight"
SD = StableDiffusionConfig(
    unet=replace(TINY.unet, in_channels=4),
    vae=TINY.vae,
    text=CLIPTextConfig(width=64, num_layers=1, num_heads=1, vocab_size=50, mlp_width=64),
)


def sd_state(seed, config=SD):
    with torch.device("meta"):
        model = StableDiffusion(config)
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, tuple(p.shape), generator) for name, p in model.state_dict().items()}


def write(path, state, **extras):
    torch.save({"state_dict": state, **extras}, path)
    return path


@pytest.fixture
def a(tmp_path):
    return write(tmp_path / "a.ckpt", seeded_state(TINY, 1), pbe=pbe_entry(TINY))


@pytest.fixture
def b(tmp_path):
    return write(tmp_path / "b.ckpt", sd_state(2))


@pytest.fixture
def c(tmp_path):
    return write(tmp_path / "c.ckpt", sd_state(3))


def merge(*arguments, to="merged.ckpt"):
    """Runs the command beside the first file; the merged tensors."""
    out = arguments[0].with_name(to)
    assert main(["merge", *map(str, arguments), "--out", str(out)]) == 0
    file = open_recognised(out)
    return {name: file.tensor(name) for name in file.mappings}


def refused(capsys, *arguments):
    """Runs the command, which must fail and write nothing; the one line of its error."""
    out = arguments[0].with_name("no.ckpt")
    assert main(["merge", *map(str, arguments), "--out", str(out)]) == 2
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_fine_tune_of_stable_diffusion_is_carried_over(a, b, c, capsys):
    merged = merge(a, b, c, "--add-difference", "--weight", "0.5", "--part", "vae=0")
    said = capsys.readouterr().out
    texts = sum(".text_model." in name for name in sd_state(2))
    visions = sum(".vision_model." in name for name in merged)
    conditions = sum(not name.startswith(("model.", "first_")) for name in merged) - visions
    left_out = f"clip-text ({texts} tensors), clip-vision ({visions} tensors), condition ({conditions} tensors)"
    assert said == f"left out, since one of the three lacks them: {left_out}\n"
    ours, tuned, base = seeded_state(TINY, 1), sd_state(2), sd_state(3)
    assert merged.keys() == ours.keys()
    for name, tensor in ours.items():
        if not name.startswith("model."):
            assert torch.equal(merged[name], tensor), name  # the autoencoder's weight is 0
        elif name != KERNEL:
            assert torch.equal(merged[name], tensor + 0.5 * (tuned[name] - base[name])), name
    assert torch.equal(merged[KERNEL][:, :4], ours[KERNEL][:, :4] + 0.5 * (tuned[KERNEL] - base[KERNEL]))
    assert torch.equal(merged[KERNEL][:, 4:], ours[KERNEL][:, 4:])
    assert pbe.load_model(a.with_name("merged.ckpt"), "cpu").config == TINY


def test_a_difference_of_nothing_changes_nothing(a, b):
    half = write(a.with_name("half.ckpt"), seeded_state(TINY, 1, torch.float16), pbe=pbe_entry(TINY))
    for model in (a, half):
        merged = merge(model, b, b, "--add-difference", "--force")
        file = open_recognised(model)
        for name, tensor in merged.items():
            assert tensor.dtype == file.dtype(name)
            assert torch.equal(tensor, file.tensor(name)), name


@pytest.mark.slow
def test_equal_inputs_take_the_whole_difference(a, b, c):
    """Of three models with our nine inputs, and of three with Stable Diffusion's four."""
    states = [seeded_state(TINY, seed) for seed in (1, 4, 5)]
    ours = [write(a.with_name(f"{i}.ckpt"), state, pbe=pbe_entry(TINY)) for i, state in enumerate(states)]
    merged = merge(*ours, "--add-difference", "--part", "condition=2")
    assert torch.equal(merged[KERNEL], states[0][KERNEL] + (states[1][KERNEL] - states[2][KERNEL]))
    x, y, z = (state["proj_out.weight"] for state in states)
    assert torch.equal(merged["proj_out.weight"], x + 2 * (y - z))
    text = next(name for name in sd_state(2) if ".text_model." in name)
    merged = merge(b, c, b, "--add-difference", "--force")
    assert torch.equal(merged[text], sd_state(2)[text] + (sd_state(3)[text] - sd_state(2)[text]))


def test_inpainting_models_share_z_t_alone(a, c):
    """SD-inpainting's nine inputs are in another order than ours; minus the four of Stable Diffusion too."""
    state = sd_state(2, replace(SD, unet=replace(SD.unet, in_channels=9)))
    merged = merge(a, write(a.with_name("inpainting.ckpt"), state), c, "--add-difference")
    ours, base = seeded_state(TINY, 1)[KERNEL], sd_state(3)[KERNEL]
    assert torch.equal(merged[KERNEL][:, :4], ours[:, :4] + (state[KERNEL][:, :4] - base))
    assert torch.equal(merged[KERNEL][:, 4:], ours[:, 4:])
    write(a.with_name("expanded.ckpt"), state, pbe={"inputs": OUR_INPUTS})
    merged = merge(a, a.with_name("expanded.ckpt"), a.with_name("expanded.ckpt"), "--add-difference", "--force")
    assert torch.equal(merged[KERNEL], ours)


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["first_stage_model.", "cond_stage_model."])
def test_a_fine_tune_may_lack_a_network(a, b, c, capsys, lacking):
    state = {name: tensor for name, tensor in sd_state(2).items() if not name.startswith(lacking)}
    merged = merge(a, write(b, state), c, "--add-difference")
    assert ("vae (" in capsys.readouterr().out) == (lacking == "first_stage_model.")
    name = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(merged[name], seeded_state(TINY, 1)[name]) == (lacking == "first_stage_model.")
    assert not torch.equal(merged[KERNEL], seeded_state(TINY, 1)[KERNEL])


def test_other_mismatches_are_errors_that_name_the_tensor(a, b, c, capsys):
    wider = sd_state(3, replace(SD, unet=replace(SD.unet, context_dim=96)))
    error = refused(capsys, a, b, write(c, wider), "--add-difference")
    assert "c.ckpt does not fit" in error
    assert "attn2.to_k.weight (32, 96) for (32, 64)" in error
    less = sd_state(3)
    del less["model.diffusion_model.out.2.bias"]
    error = refused(capsys, a, write(b, less), c, "--add-difference")
    assert "b.ckpt does not fit" in error
    assert "lacks 1: model.diffusion_model.out.2.bias" in error


def test_wrong_weights_and_parts(a, b, c, capsys):
    assert "takes three checkpoints, A B C, got 2" in refused(capsys, a, b, "--add-difference")
    assert "needs 1" in refused(capsys, a, b, c, "--add-difference", "--weight", "1", "2")
    assert "must be finite, got nan" in refused(capsys, a, b, c, "--add-difference", "--weight", "nan")
    assert "no part 'clip-text' to merge" in refused(capsys, a, b, c, "--add-difference", "--part", "clip-text=0.5")
    assert "choose clip-vision, condition, unet, vae" in refused(
        capsys, a, a, "--weights", "0.5", "0.5", "--part", "u=1,0"
    )
    assert "add up to 0.5" in refused(capsys, a, a, "--weights", "0.5", "0.5", "--part", "unet=0.25,0.25")
    assert "needs 2" in refused(capsys, a, a, "--weights", "0.5", "0.5", "--part", "unet=1")
    assert "needs 2" in refused(capsys, a, a)
    with pytest.raises(SystemExit):
        main(["merge", str(a), "--weights", "1", "--part", "unet", "--out", str(a.with_name("no.ckpt"))])
    assert "'unet' is not a network and its weight, such as unet=0.5" in capsys.readouterr().err


def test_parts_of_a_weighted_sum(a):
    other = write(a.with_name("other.ckpt"), seeded_state(TINY, 2), pbe=pbe_entry(TINY))
    merged = merge(a, other, "--weights", "1", "0", "--part", "unet=0,1", "--part", "vae=0.5,0.5")
    x, y = seeded_state(TINY, 1), seeded_state(TINY, 2)
    for name, tensor in merged.items():
        unet, vae = name.startswith("model."), name.startswith("first_stage_model.")
        assert torch.equal(tensor, y[name] if unet else 0.5 * x[name] + 0.5 * y[name] if vae else x[name]), name


def test_what_overflows_float16_is_an_error(a, tmp_path, capsys):
    """70000 is no float16, 65510 is rounded to one, and infinities and NaN that were there stay."""
    state, name, out = seeded_state(TINY, 1), "proj_out.bias", tmp_path / "out.ckpt"
    state[name][:4] = torch.tensor([float("inf"), float("nan"), 65510, -70000])
    path = write(tmp_path / "large.ckpt", state, pbe=pbe_entry(TINY))
    assert main(["slim", str(path), "--out", str(out), "--dtype", "float16"]) == 2
    assert f"large.ckpt: {name} holds 70000, beyond float16's 65504" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(ValueError, match=f"{name} holds 70000, beyond float16"):
        pbe.load_model(path, "cpu", "float16")
    assert main(["slim", str(path), "--out", str(out), "--dtype", "bfloat16"]) == 0

    state[name][3] = 65504
    path = write(tmp_path / "large.ckpt", state, pbe=pbe_entry(TINY))
    assert main(["slim", str(path), "--out", str(out), "--dtype", "float16", "--force"]) == 0
    kept = open_recognised(out).tensor(name)[:4].float()
    assert torch.equal(kept.nan_to_num(nan=1.0, posinf=2.0), torch.tensor([2.0, 1.0, 65504, 65504]))

    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): 1e6 * x for n, x in state.items()}
    averages = {n: x for n, x in averages.items() if n.startswith("model_ema.diffusion_model")}
    path = write(tmp_path / "averages.ckpt", state | averages, pbe=pbe_entry(TINY))
    assert main(["extract-ema", str(path), "--out", str(out), "--dtype", "float16", "--force"]) == 2
    assert "averages.ckpt: model.diffusion_model" in capsys.readouterr().err


def test_what_a_merge_makes_too_large_is_an_error(a, capsys):
    name, state = "proj_out.bias", seeded_state(TINY, 1)
    state[name][0] = 65504
    large = write(a.with_name("large.ckpt"), state, pbe=pbe_entry(TINY))
    small = write(a, seeded_state(TINY, 1, torch.float16), pbe=pbe_entry(TINY))
    assert f"the merged {name} holds 131" in refused(capsys, small, large, "--weights", "-1", "2")
    assert f"the merged {name} holds 131" in refused(capsys, small, large, small, "--add-difference", "--weight", "2")
    vae = seeded_state(TINY, 1)
    vae["first_stage_model.decoder.conv_in.bias"][0] = 1e5
    write(large, vae, pbe=pbe_entry(TINY))
    assert main(["set-vae", str(small), str(large), "--out", str(a.with_name("no.ckpt"))]) == 2
    assert "first_stage_model.decoder.conv_in.bias holds 100000" in capsys.readouterr().err
