"""What training changed, as adapters: exact where its rank allows, else the closest there is."""

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from pbe.checkpoints.adapter_extraction import extract_adapter, low_rank
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import load_model, open_recognised
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.checkpoint import main

BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
CHANGED = [f"{BLOCK}attn1.to_q", f"{BLOCK}ff.net.2", "model.diffusion_model.input_blocks.1.0.in_layers.2"]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(tmp_path):
    """A checkpoint, and one whose three layers differ by matrices of rank 3."""
    state = seeded_state(TINY, 0)
    save_checkpoint(state, tmp_path / "base.ckpt", pbe_entry(TINY))
    for i, name in enumerate(CHANGED):
        weight = state[f"{name}.weight"]
        change = draw(len(weight), 3, seed=i) @ draw(3, weight[0].numel(), seed=i + 10)
        state[f"{name}.weight"] = weight + 0.05 * change.view_as(weight)
    save_checkpoint(
        state,
        tmp_path / "tuned.ckpt",
        {**pbe_entry(TINY), "distilled": {"sampler": "lcm", "steps": 4, "guidance": 1.0}},
    )
    return state, tmp_path / "base.ckpt", tmp_path / "tuned.ckpt"


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_difference_of_low_rank_comes_back(pair, tmp_path, capsys, format):
    tuned, base, path = pair
    out = tmp_path / "adapter.safetensors"
    arguments = ["extract-adapter", str(base), str(path), "--rank", "3", "--to", format, "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(arguments) == 0
    *lines, total = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[2] for line in lines} == set(CHANGED)
    assert all(float(line.split()[0]) < 1e-4 for line in lines)
    assert total.endswith("all 3 layers")
    assert len(load_file(out)) == 3 * (3 if format == "kohya" else 2)
    model = load_model(base, "cpu", "float32", [out])
    assert all((x - tuned[name]).abs().max() < 1e-5 for name, x in model.state_dict().items())
    assert model.config.distilled.sampler == "lcm"


def test_lower_rank_is_the_closest_and_its_error_is_told(pair, capsys):
    base, path = map(open_recognised, pair[1:])
    told = {}
    adapter = extract_adapter(base, path, 2, lambda layer, *norms: told.update({layer: norms}))
    for name, update in adapter.updates.items():
        change = (path.tensor(f"{name}.weight") - base.tensor(f"{name}.weight")).flatten(1)
        s = torch.linalg.svdvals(change)
        assert update.rank == 2
        assert told[name] == pytest.approx((s[2:].norm().item(), s.norm().item()), rel=1e-3)
        assert (change - update.matrix("cpu")).norm().item() == pytest.approx(told[name][0], rel=1e-4)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (4, 4)])
def test_low_rank(shape):
    matrix = draw(*shape)
    up, down = low_rank(matrix, 3)
    assert (up.shape, down.shape) == ((shape[0], 3), (3, shape[1]))
    assert (matrix - up @ down).norm().item() == pytest.approx(torch.linalg.svdvals(matrix)[3:].norm().item(), rel=1e-4)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)  # neither is too small for 16 bits
    assert all(x.isfinite().all() for x in low_rank(torch.zeros(shape), 3))
    assert torch.allclose(torch.mm(*low_rank(matrix, 100)), matrix, atol=1e-5)


def test_what_adapters_cannot_hold_is_named(pair, tmp_path):
    state, base, path = pair
    bias, norm, vector = (f"{BLOCK}ff.net.2.bias", f"{BLOCK}norm1.weight", "learnable_vector")
    for name in (bias, norm, vector):
        state[name] = state[name] + 1
    save_checkpoint(state, path, pbe_entry(TINY), overwrite=True)
    with pytest.warns(UserWarning, match=rf"3 parameters differ that adapters cannot hold: .*{vector}"):
        extract_adapter(open_recognised(base), open_recognised(path), 1)


def test_pairs_that_do_not_fit(pair, tmp_path):
    state, base, path = pair
    with pytest.raises(CheckpointError, match="in all layers that adapters can change"):
        extract_adapter(open_recognised(base), open_recognised(base), 1)
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        extract_adapter(open_recognised(base), open_recognised(path), 0)
    state[f"{CHANGED[0]}.weight"][0, 0] = float("nan")
    save_checkpoint(state, path, pbe_entry(TINY), overwrite=True)
    with pytest.raises(CheckpointError, match=r"attn1\.to_q\.weight is not finite"):
        extract_adapter(open_recognised(base), open_recognised(path), 1)
    other = replace(TINY, unet=replace(TINY.unet, num_res_blocks=TINY.unet.num_res_blocks + 1))
    save_checkpoint(seeded_state(other, 0), path, pbe_entry(other), overwrite=True)
    with pytest.raises(CheckpointError, match=r"the UNet of .*base\.ckpt is not that of .*tuned\.ckpt: it lacks"):
        extract_adapter(open_recognised(base), open_recognised(path), 1)
