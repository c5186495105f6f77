"""Adapters: nothing at first, exactly their update when merged, and files that fit or are refused."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY
from golden_file import noise

import pbe
from pbe.checkpoints.adapters import add_adapters
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.checkpoint import main
from pbe.models.lora import LoRAConfig, LoRALinear, add_lora, is_adapter, merge_lora
from pbe.models.paint_by_example import Distilled, PaintByExample

CONFIG = LoRAConfig(rank=2, alpha=4.0)


def make_model():
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.eval()


def adapted(seed=1):
    """A model whose adapters have learnt something."""
    model = make_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in add_lora(model, CONFIG, generator):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save_adapters(tensors, path, **about):
    """A file as training writes it."""
    adapters = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    save_checkpoint(adapters, path, {**about, "lora": asdict(CONFIG)})


@torch.no_grad()
def predict(model):
    return model.unet(noise("x", 1, 9, 8, 8), torch.tensor([300]), noise("c", 1, 1, 64))


def test_a_fresh_adapter_changes_nothing_and_keeps_the_keys():
    plain, model = make_model(), make_model()
    parameters = add_lora(model, CONFIG, torch.Generator().manual_seed(0))
    assert torch.equal(predict(model), predict(plain))
    names = model.state_dict().keys()
    assert plain.state_dict().keys() == {name for name in names if not is_adapter(name)}
    assert len(parameters) == sum(map(is_adapter, names))
    # attn1's four projections and attn2's value and output, in each of the network's transformers
    assert len(parameters) == 2 * 6 * sum(name.endswith("attn1.to_q.weight") for name in names)


def test_all_adapters_get_a_gradient():
    model = make_model().requires_grad_(False)
    parameters = add_lora(model, CONFIG, torch.Generator().manual_seed(0))
    for parameter in parameters:
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    model.unet(noise("x", 1, 9, 8, 8), torch.tensor([300]), noise("c", 1, 1, 64)).square().mean().backward()
    assert {p for p in model.parameters() if p.grad is not None} == set(parameters)
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_merged_weights_compute_the_same():
    model = adapted()
    before = predict(model)
    assert not torch.allclose(before, predict(make_model()), atol=1e-2)
    merge_lora(model)
    assert torch.allclose(predict(model), before, atol=1e-4)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert model.state_dict().keys() == make_model().state_dict().keys()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_saved_adapters_can_be_laid_over_the_model(tmp_path, suffix):
    model = adapted()
    path = tmp_path / f"adapter{suffix}"
    save_adapters(model.state_dict(), path, trained_on="noise")
    other = add_adapters(make_model(), path)
    assert torch.allclose(predict(other), predict(model), atol=1e-4)
    # strength 0 shows nothing; strengths act linearly on the merged matrices
    full, plain = adapted(), make_model()
    merge_lora(full)
    with_all, without = full.state_dict(), plain.state_dict()
    for weight in (0.0, 0.5, -1.0):
        part = add_adapters(make_model(), (path, weight))
        for name, tensor in part.state_dict().items():
            between = without[name] + weight * (with_all[name] - without[name])
            assert torch.allclose(tensor, between, atol=1e-5), name


def test_what_adapters_distil_for_the_merged_model_says(tmp_path, capsys):
    distilled = Distilled("lcm", 4, 1.0)
    torch.save({"state_dict": seeded_state(TINY, 0), "pbe": pbe_entry(TINY)}, tmp_path / "model.ckpt")
    paths = [str(tmp_path / name) for name in ("model.ckpt", "adapter.safetensors", "merged.ckpt")]
    save_adapters(adapted().state_dict(), tmp_path / "adapter.safetensors", distilled=asdict(distilled))
    assert main(["merge-adapter", paths[0], paths[1], "--out", paths[2]]) == 0
    assert pbe.load_model(paths[2], device="cpu").config == replace(TINY, distilled=distilled)
    save_adapters(adapted().state_dict(), tmp_path / "odd.ckpt", distilled={"sampler": "lcm"})
    assert main(["merge-adapter", paths[0], str(tmp_path / "odd.ckpt"), "--out", str(tmp_path / "no.ckpt")]) == 2
    assert "odd.ckpt: distilled={'sampler': 'lcm'} is not a mapping" in capsys.readouterr().err


def test_the_tool_merges_adapters_into_a_checkpoint(tmp_path):
    torch.save({"state_dict": seeded_state(TINY, 0), "pbe": pbe_entry(TINY)}, tmp_path / "model.ckpt")
    save_adapters(adapted().state_dict(), tmp_path / "adapter.safetensors")
    paths = [str(tmp_path / name) for name in ("model.ckpt", "adapter.safetensors", "merged.ckpt")]
    assert main(["merge-adapter", paths[0], paths[1], "--out", paths[2]]) == 0
    merged = pbe.load_model(paths[2], device="cpu")
    assert torch.allclose(predict(merged), predict(adapted()), atol=1e-4)
    assert merged.config == TINY
    assert main(["merge-adapter", paths[0], paths[0], "--out", str(tmp_path / "no.ckpt")]) == 2
    assert not (tmp_path / "no.ckpt").exists()


def test_adapters_that_do_not_fit(tmp_path):
    model = adapted()
    save_adapters(model.state_dict(), tmp_path / "adapter.ckpt")
    wrong = {n: t for n, t in model.state_dict().items() if "input_blocks.1.1" not in n}
    save_adapters(wrong, tmp_path / "wrong.ckpt")
    plain = make_model()
    with pytest.raises(CheckpointError, match=r"wrong\.ckpt: it lacks .*input_blocks\.1\.1"):
        add_adapters(plain, tmp_path / "wrong.ckpt")
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in make_model().state_dict().items())
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(model, tmp_path / "adapter.ckpt")
    later = {name: x for name, x in model.state_dict().items() if is_adapter(name)}
    save_checkpoint(later, tmp_path / "later.ckpt", {"lora": {"rank": 2, "dropout": 0.1}})
    with pytest.raises(CheckpointError, match=r"later\.ckpt: its entry 'lora' .*'dropout'"):
        add_adapters(make_model(), tmp_path / "later.ckpt")
    save_checkpoint(later, tmp_path / "rank.ckpt", {"lora": {"rank": 3}})
    with pytest.raises(CheckpointError, match=r"rank\.ckpt: .*rank 3"):
        add_adapters(make_model(), tmp_path / "rank.ckpt")
    with pytest.raises(ValueError, match="no linear layer"):
        add_lora(make_model(), LoRAConfig(targets=["nothing"]), torch.Generator())
    with pytest.raises(ValueError, match="rank"):
        LoRAConfig(rank=0)
