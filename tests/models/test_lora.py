"""Adapters: nothing at first, exactly their update when merged, and files that fit or are refused."""

import copy
from dataclasses import asdict, replace
from typing import get_args

import pytest
import torch
from conftest import TINY
from golden_file import noise
from marks import rest_slow
from torch import nn

import pbe
from pbe.checkpoints.adapters import PEFT, add_adapters, read_adapter
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.checkpoint import main
from pbe.models.lora import (
    LoRAConfig,
    LoRAConv2d,
    LoRALinear,
    Targets,
    adapters_off,
    add_lora,
    is_adapter,
    layers_of,
    merge_lora,
    target_layers,
)
from pbe.models.paint_by_example import Distilled, PaintByExample

CONFIG = LoRAConfig(rank=2, alpha=4.0)
CONFIGS = {
    "attention": CONFIG,
    "all-linear": replace(CONFIG, targets="all-linear"),
    "all": replace(CONFIG, targets="all"),
    "rslora": replace(CONFIG, rslora=True),
    "DoRA": replace(CONFIG, targets="all", dora=True, rslora=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_model(config=TINY):
    model = PaintByExample(config)
    model.load_state_dict(seeded_state(config, 0))
    return model.eval()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def teach(model):
    """Its adapters have learnt something."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_magnitude"):
            parameter.mul_(1 + 0.1 * draw(*parameter.shape))
        elif is_adapter(name):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=len(name)))


def adapted(config=CONFIG):
    model = make_model()
    add_lora(model, config, torch.Generator().manual_seed(1))
    teach(model)
    return model


def save_adapters(tensors, path, config=CONFIG, **about):
    """A file as training writes it."""
    adapters = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    save_checkpoint(adapters, path, {**about, "lora": asdict(config)})


@torch.no_grad()
def predict(model):
    return model.unet(noise("x", 1, 9, 8, 8), torch.tensor([300]), noise("c", 1, 1, 64))


@every_config
def test_a_fresh_adapter_changes_nothing_and_keeps_the_keys(config):
    plain, model = make_model(), make_model()
    parameters = add_lora(model, config, torch.Generator().manual_seed(0))
    assert torch.equal(predict(model), predict(plain))
    names = model.state_dict().keys()
    assert plain.state_dict().keys() == {name for name in names if not is_adapter(name)}
    assert len(parameters) == sum(map(is_adapter, names))


def test_targets():
    model = make_model()
    layers = {targets: target_layers(model, targets) for targets in get_args(Targets)}
    transformers = sum(name.endswith("attn1.to_q") for name in layers["attention"])
    # attn1's four projections and attn2's value and output
    assert len(layers["attention"]) == 6 * transformers
    linear = [name for name in layers["all-linear"] if name not in layers["attention"]]
    kinds = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "emb_layers.1", "skip_connection", "time_embed"]
    assert all(any(kind in name for kind in kinds) for name in linear)
    assert all(any(kind in name for name in linear) for kind in kinds)
    assert {layer.kernel_size for name, layer in layers["all"].items() if name not in layers["all-linear"]} == {(3, 3)}
    idle = {name for name in layers_of(model) if name.endswith(("attn2.to_q", "attn2.to_k"))}
    assert len(idle) == 2 * transformers
    assert layers_of(model).keys() - layers["all"].keys() == idle
    # with more tokens there is a choice of which to attend to
    many = make_model(replace(TINY, exemplar=replace(TINY.exemplar, tokens="all")))
    assert target_layers(many, "attention").keys() == layers["attention"].keys() | idle
    assert target_layers(many, "all").keys() == layers_of(many).keys()


@pytest.mark.slow
@every_config
@pytest.mark.parametrize("tokens", ["class", "all"])
def test_all_adapters_get_a_gradient(config, tokens):
    model = make_model(replace(TINY, exemplar=replace(TINY.exemplar, tokens=tokens))).requires_grad_(False)
    parameters = add_lora(model, config, torch.Generator().manual_seed(0))
    teach(model)
    context = noise("c", 1, 1 if tokens == "class" else 5, 64)
    model.unet(noise("x", 1, 9, 8, 8), torch.tensor([300]), context).square().mean().backward()
    assert {p for p in model.parameters() if p.grad is not None} == set(parameters)
    assert all(p.grad.abs().sum() > 0 for p in parameters)


@every_config
def test_merged_weights_compute_the_same(config):
    model = adapted(config)
    before = predict(model)
    with adapters_off(model):
        assert torch.equal(predict(model), predict(make_model()))
    assert not torch.allclose(before, predict(make_model()), atol=1e-2)
    merge_lora(model)
    torch.testing.assert_close(predict(model), before, atol=1e-4, rtol=1e-4)
    plain = make_model()
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, module in plain.named_modules():
        merged = model.get_submodule(name)
        assert type(merged) is type(module)
        assert vars(merged).keys() == vars(module).keys()
        assert str(merged) == str(module)


SHAPES = {
    "linear": (lambda: nn.Linear(12, 7), (5, 12)),
    "without bias": (lambda: nn.Linear(12, 7, bias=False), (5, 12)),
    "1x1": (lambda: nn.Conv2d(6, 7, 1), (2, 6, 5, 5)),
    "3x3": (lambda: nn.Conv2d(6, 7, 3, padding=1), (2, 6, 5, 5)),
    "stride 2": (lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1), (2, 6, 7, 7)),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("make", "shape"), SHAPES.values(), ids=SHAPES)
def test_layers_compute_what_peft_s_do(make, shape, dora, rslora):
    """Forwards, and the gradients of adapters and input: DoRA's norm is a constant there too."""
    peft = pytest.importorskip("peft")
    layer = make().requires_grad_(False)
    theirs = nn.Sequential(copy.deepcopy(layer))
    settings = {"r": 3, "lora_alpha": 5.0, "use_dora": dora, "use_rslora": rslora}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["0"], **settings))
    kind = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
    ours = kind(layer, LoRAConfig(3, 5.0, dora=dora, rslora=rslora), torch.Generator())
    x = draw(*shape)
    assert torch.equal(ours(x), layer(x))
    for name, parameter in ours.named_parameters():
        if name.startswith("lora_"):
            parameter.data = parameter + 0.3 * draw(*parameter.shape, seed=len(name))
    pairs = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            role = next(ours for theirs, ours in PEFT.items() if theirs.split(".")[0] in name)
            pairs["lora_magnitude" if role == "magnitude" else role] = parameter
    assert pairs.keys() == {name for name, _ in ours.named_parameters()} - {"weight", "bias"}
    gradients = []
    for module in (ours, theirs):
        x = draw(*shape).requires_grad_()
        with torch.no_grad():
            for name, parameter in pairs.items():
                parameter.copy_(ours.get_parameter(name).view_as(parameter))
        y = module(x)
        (y * draw(*y.shape, seed=3)).sum().backward()
        gradients.append((y.detach(), x.grad))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    for name, parameter in pairs.items():
        gradient = ours.get_parameter(name).grad
        torch.testing.assert_close(gradient.view_as(parameter), parameter.grad, atol=1e-5, rtol=1e-5)


def test_dora_of_a_row_of_zeros_stays_finite():
    layer = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    ours = LoRALinear(layer, LoRAConfig(rank=2, dora=True), torch.Generator())
    ours(draw(2, 4)).sum().backward()
    assert all(p.grad.isfinite().all() for name, p in ours.named_parameters())


@pytest.mark.slow
@every_config
def test_saved_adapters_compute_what_the_trained_model_does(tmp_path, config):
    model = adapted(config)
    save_adapters(model.state_dict(), tmp_path / "adapter.ckpt", config)
    other = add_adapters(make_model(), tmp_path / "adapter.ckpt")
    torch.testing.assert_close(predict(other), predict(model), atol=1e-4, rtol=1e-4)


def test_older_files_name_their_layers_by_expressions(tmp_path):
    model, entry = adapted(), {"rank": 2, "alpha": 4.0, "targets": [r".*\.attn1\.to_(q|k|v)", r".*\.attn2\.to_v"]}
    tensors = {name: x for name, x in model.state_dict().items() if is_adapter(name)}
    save_checkpoint(tensors, tmp_path / "older.ckpt", {"lora": entry})
    other = add_adapters(make_model(), tmp_path / "older.ckpt")
    assert torch.allclose(predict(other), predict(model), atol=1e-4)


def test_a_file_of_one_token_s_model_fits_one_of_more(tmp_path):
    save_adapters(adapted().state_dict(), tmp_path / "adapter.ckpt")
    many = make_model(replace(TINY, exemplar=replace(TINY.exemplar, tokens="all")))
    assert (
        read_adapter(tmp_path / "adapter.ckpt", many).updates.keys() == target_layers(make_model(), "attention").keys()
    )


@pytest.mark.parametrize("suffix", rest_slow([".safetensors", ".ckpt"]))
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    save_checkpoint(later, tmp_path / "dora.ckpt", {"lora": {"rank": 2, "dora": True}})
    with pytest.raises(CheckpointError, match=r"dora\.ckpt: it lacks the adapters of \d+ layers"):
        add_adapters(make_model(), tmp_path / "dora.ckpt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be .* got 0"),
        ({"targets": "nothing"}, "attention, all-linear, all, got 'nothing'"),
        ({"targets": [".*"]}, r"attention, all-linear, all, got \['\.\*'\]"),
        ({"dora": 1}, "dora must be true or false, got 1"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**settings)
