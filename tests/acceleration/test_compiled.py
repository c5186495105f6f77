"""Compiled models: how many graphs there are, equal pictures, what CUDA graphs need, and a user's own compilation."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from golden_file import noise
from PIL import Image
from torch import nn

import pbe
from pbe.acceleration import is_compiled, prepare_for_inference
from pbe.acceleration.compiled import REGIONS, compile_networks, kept
from pbe.checkpoints.seeding import seeded_state
from pbe.models.paint_by_example import PaintByExample

testing = pytest.importorskip("torch._dynamo.testing")


@pytest.fixture(autouse=True)
def _fresh():
    """Graphs are kept by code: no test may find another's."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> PaintByExample:
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.eval()


INPUTS = noise("x", 1, 9, 8, 8), torch.tensor([441]), noise("context", 2, 1, 64)
Z = noise("z", 1, 4, 4, 4)
ARGS = (
    np.random.default_rng(0).random((64, 64, 3), dtype=np.float32),
    (20, 20, 60, 50),
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)),
)


def kinds(model) -> set[tuple]:
    """Kind, weights' shapes and inputs' shapes of each call of a block that may be compiled."""
    seen = set()

    def recorded(block, call):
        def record(*args):
            weights = tuple(tuple(p.shape) for p in block.parameters())
            seen.add((type(block), weights, tuple(tuple(x.shape) for x in args)))
            return call(*args)

        return record

    for block in [*model.unet.modules(), *model.vae.decoder.modules()]:
        if type(block) in REGIONS:
            name = REGIONS[type(block)]
            setattr(block, name, recorded(block, getattr(block, name)))
    model.unet(*INPUTS)
    model.vae.decode(Z)
    return seen


@pytest.mark.slow
def test_regions_are_one_graph_for_each_kind_and_shape_of_block(model):
    """Also where there are more kinds than torch keeps graphs of one function."""
    plain, prepared = prepare_for_inference(model), prepare_for_inference(model)
    counter = testing.CompileCounter()
    compile_networks(prepared, "regions", backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(2):  # the second time there is nothing to compile
            torch.testing.assert_close(prepared.unet(*INPUTS), plain.unet(*INPUTS), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(prepared.vae.decode(Z), plain.vae.decode(Z), rtol=1e-5, atol=1e-5)
    blocks = [m for m in [*plain.unet.modules(), *plain.vae.decoder.modules()] if type(m) in REGIONS]
    assert counter.frame_count == len(kinds(plain)) < len(blocks)


@pytest.mark.slow
def test_the_whole_is_one_graph_for_the_unet_and_one_for_the_decoder(model):
    plain, prepared = prepare_for_inference(model), prepare_for_inference(model)
    counter = testing.CompileCounter()
    compile_networks(prepared, "whole", backend=counter)
    for _ in range(2):
        torch.testing.assert_close(prepared.unet(*INPUTS), plain.unet(*INPUTS), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1
    for _ in range(2):
        torch.testing.assert_close(prepared.vae.decode(Z), plain.vae.decode(Z), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 2


def test_edits_are_the_same_pictures(monkeypatch, model):
    counter = testing.CompileCounter()
    monkeypatch.setattr("pbe.acceleration.prepare.compile_networks", partial(compile_networks, backend=counter))
    (expected,) = pbe.edit(model, *ARGS, steps=4)
    (result,) = pbe.edit(prepare_for_inference(model, consume=True, compile="regions"), *ARGS, steps=4)
    assert counter.op_count > 50
    assert np.abs(result - expected).max() < 1e-3  # of full scale; float32's rounding, magnified by guidance


def test_a_compiled_model_holds_only_what_torch_can_trace(monkeypatch, model):
    monkeypatch.setattr("pbe.acceleration.prepare.compile_networks", lambda *_: None)
    prepared = prepare_for_inference(model, consume=True, compile="whole")
    convolutions = [m for m in prepared.unet.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


@pytest.mark.parametrize(("device", "mode"), [("cuda", "reduce-overhead"), ("cpu", None)])
def test_cuda_graphs_replay_the_unet_alone(monkeypatch, device, mode):
    """A decoder is called once for each picture: its graph would keep memory and save nothing."""
    modes = []

    def fake(function, *, mode=None, dynamic, backend):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    vae = SimpleNamespace(decoder=SimpleNamespace(forward=lambda z: z))
    unet = SimpleNamespace(predict=lambda x: x, predict_from=lambda x: x)
    stub = SimpleNamespace(device=torch.device(device), unet=unet, vae=vae)
    compile_networks(stub, "whole")
    assert modes == [mode, mode, None]


def test_predictions_last_where_a_graph_writes_over_its_own():
    static = torch.zeros(2)
    predict = kept(static.copy_)
    history = [predict(torch.full((2,), float(i))) for i in range(3)]
    assert [x[0].item() for x in history] == [0, 1, 2]


def test_a_user_s_own_compilation_is_used(model):
    (expected,) = pbe.edit(model, *ARGS, steps=4)
    counter = testing.CompileCounter()
    model.unet.out.compile(backend=counter)  # a part is enough
    (result,) = pbe.edit(model, *ARGS, steps=4)
    assert counter.frame_count == 1
    assert np.abs(result - expected).max() < 1e-3
    with pytest.raises(ValueError, match=r"model is compiled.*compile='whole'"):
        prepare_for_inference(model)


def test_both_ways_of_compiling_are_seen(model):
    assert not is_compiled(model)
    wrapped = torch.compile(model.vae.decoder, backend="eager")
    assert not is_compiled(model)
    model.vae.decoder = wrapped
    assert is_compiled(model)
    assert not is_compiled(model.unet)


def test_an_unknown_way_is_named(model):
    with pytest.raises(ValueError, match="'regions' or 'whole', got 'all'"):
        prepare_for_inference(model, consume=True, compile="all")
    assert model.unet is not None  # it was not given up for nothing


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regions", "whole"])
def test_generated_code_computes_the_same(model, how):
    """What torch generates for a CPU, to float32's rounding through about 60 layers."""
    plain, prepared = prepare_for_inference(model), prepare_for_inference(model, compile=how)
    torch.testing.assert_close(prepared.unet(*INPUTS), plain.unet(*INPUTS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prepared.vae.decode(Z), plain.vae.decode(Z), rtol=1e-4, atol=1e-5)
