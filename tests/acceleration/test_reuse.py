"""Deep features used again: against the same made of an ordinary network's pieces, and when which blocks run."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY
from golden_file import noise
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.acceleration.compiled import compile_networks
from pbe.acceleration.unet import SHALLOW
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.seeding import seeded_state
from pbe.models.blocks import Signals, timestep_embedding
from pbe.models.paint_by_example import Condition, PaintByExample, PaintByExampleConfig
from pbe.models.unet import UNetConfig
from pbe.sampling import NoiseSchedule, get_sampler, guided_eps

UNET = UNetConfig(model_channels=32, channel_mult=(1, 1, 2), num_res_blocks=1, attention_levels=(0, 1), context_dim=64)
CONFIG = replace(TINY, unet=UNET)
SEVERAL = replace(CONFIG, exemplar=replace(CONFIG.exemplar, tokens="all"))
EXEMPLAR = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8))
PHOTO = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
BOX = 20, 20, 60, 50


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def make_model(config=CONFIG) -> PaintByExample:
    model = PaintByExample(config)
    model.load_state_dict(seeded_state(config, 0))
    return model.eval()


def condition(batch, tokens=1, size=(9, 6)) -> Condition:
    z_masked, mask = noise("z", batch, 4, *size), noise("keep", batch, 1, *size)
    return Condition(z_masked, mask, noise("context", batch, tokens, 64))


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def by_hand(unet, reuse):
    """An ordinary UNet's prediction with deep features of the first of `reuse` calls, in the shape of a network."""
    memory = {"calls": 0}

    def network(unet_in, t, context):
        whole = memory["calls"] % reuse == 0
        memory["calls"] += 1
        emb = unet.time_embed(timestep_embedding(t, unet.config.model_channels))
        x, skips, n = unet_in, [], len(unet.input_blocks)
        for layers in unet.input_blocks[: n if whole else SHALLOW]:
            x = layers(x, Signals(emb, context, x.shape[-2:]))
            skips.append(x)
        if whole:
            x = unet.middle_block(x, Signals(emb, context, x.shape[-2:]))
            for i in range(n - SHALLOW):
                size = skips[-2].shape[-2:]
                x = unet.output_blocks[i](torch.cat([x, skips.pop()], 1), Signals(emb, context, size))
            memory["deep"] = x
        x = memory["deep"]
        for i in range(n - SHALLOW, n):
            x = unet.output_blocks[i](torch.cat([x, skips.pop()], 1), Signals(emb, context, x.shape[-2:]))
        return unet.out(x)

    return network


def runs_of(prepared) -> list[str]:
    """A list to which each call adds "whole" or "light"; asserts that it runs all of the network's blocks, or `SHALLOW`
    of them at either end."""
    unet, seen, runs = prepared.unet, [], []
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: seen.append(i))
    everything = list(range(len(blocks)))
    light = everything[:SHALLOW] + everything[-SHALLOW:]

    def called(*_):
        assert seen in (everything, light)
        runs.append("whole" if seen == everything else "light")
        seen.clear()

    unet.out.register_forward_hook(called)
    return runs


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0, 1, 3.0])
@pytest.mark.parametrize(("config", "tokens"), [(CONFIG, 1), (SEVERAL, 5)])
@pytest.mark.parametrize("consume", [False, True])
def test_equals_the_pieces_of_an_ordinary_network(consume, config, tokens, guidance):
    """Shared halves, folded and fused layers and packed weights beside plain ones: to float32's rounding."""
    model, batch = make_model(config), 2
    cond, grid = condition(batch, tokens), NoiseSchedule.scaled_linear().grid([981, 961, 500, 480, 21])
    reference = by_hand(model.unet, reuse=3)
    scale = [] if guidance in (0, 1) else [model.null_context.expand(batch, tokens, -1)]
    context = torch.cat([*scale, model.null_context.expand(batch, tokens, -1) if guidance == 0 else cond.context])
    expected = []
    for step in grid:
        unet_in = torch.cat([noise(f"x{step.t}", batch, 4, 9, 6), cond.z_masked, cond.mask], dim=1)
        times = len(context) // batch
        y = reference(torch.cat([unet_in] * times), torch.tensor([step.t] * len(context)), context)
        expected.append(y if times == 1 else y[:batch] + guidance * (y[batch:] - y[:batch]))
    prepared = prepare_for_inference(model, consume=consume)
    for known in (None, grid):
        eps = guided_eps(prepared, cond, guidance, known, reuse=3)
        for step, y in zip(grid, expected, strict=True):
            x_t = noise(f"x{step.t}", batch, 4, 9, 6)
            assert relative(eps(x_t, torch.tensor([step.t] * batch)), y) < 1e-5


def test_off_and_the_first_call_are_exact_to_the_bit():
    prepared = prepare_for_inference(make_model(), consume=True)
    unet_in, context = noise("x", 2, 9, 9, 6), noise("context", 4, 1, 64)
    plain, off, on = (prepared.unet.bind(context, [441, 421], *reuse) for reuse in ((), (1,), (2,)))
    for t in (torch.tensor([441, 441]), torch.tensor([421, 421])):
        expected = plain(unet_in, t)
        assert torch.equal(off(unet_in, t), expected)
        assert torch.equal(on(unet_in, t), expected) == (t[0] == 441)


def test_each_sample_of_a_batch_is_what_it_is_alone():
    options = {"steps": 6, "seed": 5, "reuse": 2}
    prepared = prepare_for_inference(make_model(TINY))
    two = pbe.edit(prepared, PHOTO, BOX, EXEMPLAR, num_images=2, **options)
    (second,) = pbe.edit(prepared, PHOTO, BOX, EXEMPLAR, **{**options, "seed": 6})
    (exact,) = pbe.edit(prepared, PHOTO, BOX, EXEMPLAR, **{**options, "seed": 6, "reuse": 1})
    assert np.abs(two[1] - second).max() < 1e-3
    assert np.abs(second - exact).max() > 1e-3  # it is an approximation, and does something


@pytest.mark.slow
def test_at_full_size_a_light_call_is_a_twelfth_of_the_arithmetic():
    """Of a call with both halves of guidance at 512 pixels; nothing is computed."""
    unet = prepare_for_inference(build_on_meta(PaintByExample, PaintByExampleConfig())).unet
    unet_in, context = torch.empty(1, 9, 64, 64, device="meta"), torch.empty(2, 1, 768, device="meta")
    shifts, folded = unet.shifts(torch.empty(1, device="meta"), torch.float32), unet.folded(context)
    deep, flops = None, []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            _, deep = unet.predict_from(unet_in, shifts, folded, deep)
        flops.append(counter.get_total_flops() / 1e12)
    assert flops == pytest.approx([1.426, 0.122], abs=1e-3)


# --- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reuse", "light"), [(1, 0), (2, 1), (3, 2), (50, 4)])
def test_one_of_n_calls_runs_the_whole_network(reuse, light):
    prepared = prepare_for_inference(make_model())
    runs = runs_of(prepared)
    for _ in range(2):  # each loop begins with a whole one
        predict = prepared.unet.bind(noise("context", 2, 1, 64), reuse=reuse)
        for t in (900, 800, 700, 600, 500):
            predict(noise("x", 1, 9, 8, 8), torch.tensor([t]))
    pattern = (["whole"] + ["light"] * light) * 5
    assert runs == pattern[:5] * 2


@pytest.mark.parametrize(("sampler", "calls"), [("plms", 5), ("ddim", 4)])
def test_calls_are_counted_rather_than_steps(sampler, calls):
    """PLMS evaluates twice in its first step, the second time with the features of the first."""
    prepared = prepare_for_inference(make_model())
    runs, grid = runs_of(prepared), NoiseSchedule.scaled_linear().grid([751, 501, 251, 1])
    get_sampler(sampler)(guided_eps(prepared, condition(1), 5.0, grid, reuse=2), noise("x_T", 1, 4, 9, 6), grid)
    assert runs == ["whole", "light", "whole", "light", "whole"][:calls]


def test_features_do_not_outlive_their_side_of_the_guidance_interval():
    """Above, inside and below it each begin with a whole call, though above and below are computed alike."""
    prepared = prepare_for_inference(make_model())
    cond, timesteps = condition(2), [950, 900, 700, 650, 100, 50]
    runs, grid = runs_of(prepared), NoiseSchedule.scaled_linear().grid(timesteps)
    eps = guided_eps(prepared, cond, 5.0, grid, interval=(200, 800), reuse=6)
    alone = [guided_eps(prepared, cond, scale, reuse=6) for scale in (1, 5.0, 1)]
    for i, t in enumerate(timesteps):
        x_t, now = noise(f"x{t}", 2, 4, 9, 6), torch.tensor([t, t])
        assert relative(eps(x_t, now), alone[i // 2](x_t, now)) < 1e-5
    assert runs == [kind for kind in ("whole", "light") for _ in range(2)] * 3


# --- with the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regions", "whole"])
def test_compiled_it_computes_the_same(monkeypatch, how):
    """As a whole there is one graph more, of the light call; regions need none beside those that there are."""
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    plain, counter = prepare_for_inference(make_model(TINY)), testing.CompileCounter()
    monkeypatch.setattr("pbe.acceleration.prepare.compile_networks", partial(compile_networks, backend=counter))
    compiled = prepare_for_inference(make_model(TINY), consume=True, compile=how)
    context, t = noise("context", 2, 1, 64), torch.tensor([441])
    predict, expected = (model.unet.bind(context, [441], reuse=2) for model in (compiled, plain))
    frames = []
    for i in range(4):
        x = noise(f"x{i}", 1, 9, 8, 8)
        torch.testing.assert_close(predict(x, t), expected(x, t), rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == ([1, 2, 2, 2] if how == "whole" else frames[:1] * 4)
    torch._dynamo.reset()


def test_a_model_that_is_not_prepared_and_a_wrong_number_are_named():
    model = make_model()
    with pytest.raises(ValueError, match=r"reuse=2 needs a model that .*prepare_for_inference made"):
        guided_eps(model, condition(1), 5.0, reuse=2)
    with pytest.raises(ValueError, match=r"reuse must be at least 1, .* got 0"):
        guided_eps(prepare_for_inference(model), condition(1), 5.0, reuse=0)
    with pytest.raises(ValueError, match=r"reuse must be .*, got 0"):
        pbe.edit(model, PHOTO, BOX, EXEMPLAR, reuse=0)
