"""Prepared models: each faster form against the ordinary path, who holds which weights, and what is refused."""

import copy
import gc
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from golden_file import noise
from marks import rest_slow
from PIL import Image
from torch import nn

import pbe
from pbe.acceleration import PreparedModel, prepare_for_inference
from pbe.acceleration.layers import FusedSelfAttention, PhaseUpsample, tiled_attention
from pbe.acceleration.packing import PackedConv2d, PackedLinear, PackedPointwise, can_pack
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.seeding import seeded_state
from pbe.models.blocks import copies
from pbe.models.lora import LoRAConfig, add_lora
from pbe.models.paint_by_example import Condition, PaintByExample, PaintByExampleConfig
from pbe.models.unet import Attention, SpatialTransformer, TransformerBlock, UNetConfig, Upsample
from pbe.models.vae import Upsample as VAEUpsample
from pbe.sampling import NoiseSchedule, get_sampler, guided_eps, leading

UNET = UNetConfig(model_channels=32, channel_mult=(1, 1, 2), num_res_blocks=1, attention_levels=(0, 1), context_dim=64)
CONFIG = replace(TINY, unet=UNET)
CPU = torch.device("cpu")
packs = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@cache
def state_of(config):
    return seeded_state(config, 0)


def make_model(config=CONFIG, dtype=torch.float32):
    model = PaintByExample(config)
    model.load_state_dict(state_of(config))  # copies it
    return model.to(dtype).eval()


def inputs(batch, size, dtype=torch.float32, tokens=1):
    """unet_in, t and, for each sample, two contexts."""
    t = torch.tensor([981, 21, 441])[:batch]
    context = noise("context", 2 * batch, tokens, 64)
    return noise("x", batch, 9, *size).to(dtype), t, context.to(dtype)


def ordinary(model, unet_in, t, context):
    return model.unet(torch.cat([unet_in, unet_in]), torch.cat([t, t]), context)


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# --- the forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (1, 4), (1, 1)])
def test_phases_equal_upsampling_and_convolution_at_the_border_too(size, channels_last):
    """In float64 to its rounding: every position, so the first and last rows and columns as well."""
    ours, vae = Upsample(6).double(), VAEUpsample(6).double()
    x = noise("x", 2, 6, *size).double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    h, w = 2 * size[0], 2 * size[1]
    torch.testing.assert_close(PhaseUpsample(vae.conv)(x), vae(x), rtol=1e-12, atol=1e-12)
    phases = PhaseUpsample(ours.conv)
    for height, width in ((h, w), (h - 1, w), (h, w - 1), (h - 1, w - 1)):
        torch.testing.assert_close(phases(x, (height, width)), ours(x, (height, width)), rtol=1e-12, atol=1e-12)


def test_phases_keep_channels_last():
    x = noise("x", 1, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    assert PhaseUpsample(Upsample(6).conv)(x).is_contiguous(memory_format=torch.channels_last)


def test_phases_use_four_ninths_of_the_products():
    conv = Upsample(6).conv
    assert sum(phase.weight.numel() for phase in PhaseUpsample(conv).phases) == conv.weight.numel() * 16 // 9


@pytest.mark.parametrize("size", [(3, 7, 32), (1, 130, 32)])
def test_fused_projections(size):
    attention = Attention(32, 32, 4).double()
    x = noise("x", *size).double()
    torch.testing.assert_close(FusedSelfAttention(attention, tile=True)(x), attention(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 130, 1000, 3000])
def test_tiled_attention(tokens):
    """Exact in float64; in bfloat16 within 2^-7, two roundings, where the fused kernel is within one."""
    q, k, v = (noise(name, 2, 2, tokens, 8).double() for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(tiled_attention(q, k, v), expected, rtol=1e-12, atol=1e-12)
    halves = (x.bfloat16() for x in (q, k, v))
    assert relative(tiled_attention(*halves), expected) < 2**-7


def test_attention_is_tiled_only_where_it_is_faster(monkeypatch):
    calls = []

    def record(q, k, v):
        calls.append(q.shape[2])
        return tiled_attention(q, k, v)

    monkeypatch.setattr("pbe.acceleration.layers.tiled_attention", record)
    attention = Attention(32, 32, 4)
    for dtype in (torch.float32, torch.bfloat16):
        for tile in (False, True):
            for tokens in (16, 256):
                FusedSelfAttention(attention.to(dtype), tile)(noise("x", 1, tokens, 32).to(dtype))
    assert calls == [256]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (5, 3), (16, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), rest_slow([(torch.float64, 1e-13), (torch.float32, 1e-5)]))
def test_the_whole_network(dtype, tolerance, size, batch):
    """Through about 60 layers, to a few of the precision's roundings; by `forward`, and by `bind` with a table."""
    model = make_model(dtype=dtype)
    prepared = prepare_for_inference(model)
    unet_in, t, context = inputs(batch, size, dtype)
    expected = ordinary(model, unet_in, t, context)
    assert relative(prepared.unet(unet_in, t, context), expected) < tolerance
    for timesteps in ((), [441, 981, 1, 21, 981]):
        assert relative(prepared.unet.bind(context, timesteps)(unet_in, t), expected) < tolerance


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_bfloat16_is_bit_identical_where_the_rounding_is_not_changed(size, batch):
    """Folding, sharing, fusing and the table of embeddings give the very bits of the ordinary path."""
    model = make_model(dtype=torch.bfloat16)
    prepared = prepare_for_inference(model, sum_phases=False, tile_attention=False)
    unet_in, t, context = inputs(batch, size, torch.bfloat16)
    assert torch.equal(prepared.unet.bind(context, t.tolist())(unet_in, t), ordinary(model, unet_in, t, context))


def test_bfloat16_with_all_forms_is_as_near_to_float32_as_the_ordinary_path():
    """Summed kernels and rounded scores add errors of the size of those that are there already."""
    exact, model = make_model(), make_model(dtype=torch.bfloat16)
    unet_in, t, context = inputs(1, (16, 16))
    halves = unet_in.bfloat16(), t, context.bfloat16()
    expected = ordinary(exact, unet_in, t, context)
    error = relative(ordinary(model, *halves), expected)
    assert relative(prepare_for_inference(model).unet(*halves), expected) < 1.3 * error


@pytest.mark.parametrize("guidance", [0, 1, 5.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_guidance(batch, guidance):
    model = make_model()
    prepared = prepare_for_inference(model)
    x_T, keep, z_masked = (noise(name, batch, c, 9, 6) for name, c in (("x_T", 4), ("keep", 1), ("z", 4)))
    condition = Condition(z_masked, keep, noise("context", batch, 1, 64))
    grid = leading(NoiseSchedule.scaled_linear(), 5)
    for name in ("plms", "dpm_solver"):
        sample = get_sampler(name)
        expected = sample(guided_eps(model, condition, guidance), x_T, grid)
        for known in (None, grid):
            z_0 = sample(guided_eps(prepared, condition, guidance, known), x_T, grid)
            assert relative(z_0, expected) < 1e-4  # float32's rounding, magnified by guidance and the first steps


def test_the_decoder():
    model = make_model(dtype=torch.float64)
    prepared = prepare_for_inference(model)
    for size in ((8, 8), (3, 5)):
        z = noise("z", 2, 4, *size).double()
        torch.testing.assert_close(prepared.vae.decode(z), model.vae.decode(z), rtol=1e-11, atol=1e-11)
    image = noise("image", 1, 3, 32, 30).double()
    assert torch.equal(prepared.vae.encode(image).mean, model.vae.encode(image).mean)


# --- what is computed, and how often ----------------------------------------------------------------------------------


def test_halves_share_everything_before_the_first_attention_over_the_context():
    """Three samples with two contexts each: the first convolution and self-attention see 3, what follows 6."""
    prepared = prepare_for_inference(make_model())
    seen = {}
    for name, module in prepared.unet.named_modules():
        if isinstance(module, nn.Conv2d | FusedSelfAttention):
            module.register_forward_hook(lambda _, args, y, name=name: seen.update({name: len(args[0])}))
    prepared.unet(*inputs(3, (8, 8)))
    shared = [name for name, count in seen.items() if count == 3]
    assert shared == [
        "input_blocks.0.0",
        "input_blocks.1.0.block.in_layers.2",
        "input_blocks.1.0.block.out_layers.3",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.1.transformer_blocks.0.attn1",
    ]
    assert set(seen.values()) == {3, 6}


def test_the_loop_computes_nothing_that_only_timesteps_and_context_decide():
    prepared = prepare_for_inference(make_model())
    unet_in, t, context = inputs(1, (8, 8))
    predict = prepared.unet.bind(context, t.tolist())
    blocks = [b for m in prepared.unet.modules() if isinstance(m, SpatialTransformer) for b in m.transformer_blocks]
    once = [prepared.unet.time_embed, *(b.to_v for b in blocks), *(b.to_out for b in blocks)]
    once += [m for name, m in prepared.unet.named_modules() if name.endswith("emb_layers")]
    assert len(once) > 20

    def fail(*_):
        raise AssertionError("computed within the loop")

    for module in once:
        module.register_forward_hook(fail)
    predict(unet_in, t)
    with pytest.raises(AssertionError, match="within the loop"):
        prepared.unet(unet_in, t, context)  # the hooks are at the right places


def test_a_timestep_that_was_not_announced_is_not_taken_for_another():
    prepared = prepare_for_inference(make_model())
    unet_in, _, context = inputs(1, (8, 8))
    predict = prepared.unet.bind(context, [1, 501])
    assert predict(unet_in, torch.tensor([501])).isfinite().all()
    assert predict(unet_in, torch.tensor([500])).isnan().all()


def test_a_model_without_the_bottleneck_keeps_its_attention_over_the_context():
    config = replace(CONFIG, exemplar=replace(CONFIG.exemplar, tokens="all"))
    model = make_model(config, torch.float64)
    prepared = prepare_for_inference(model)
    for tokens in (1, 5):
        unet_in, t, context = inputs(3, (9, 6), torch.float64, tokens)
        assert relative(prepared.unet(unet_in, t, context), ordinary(model, unet_in, t, context)) < 1e-13


def test_several_tokens_are_refused_where_one_was_prepared_for():
    unet_in, t, context = inputs(1, (8, 8), tokens=77)
    with pytest.raises(ValueError, match="one token, not 77"):
        prepare_for_inference(make_model()).unet(unet_in, t, context)


@pytest.mark.slow
def test_traced_as_one_graph():
    """Traced only: what runs it is torch as usual."""
    prepared = prepare_for_inference(make_model(TINY))
    unet_in, t, context = inputs(1, (8, 8))
    args = unet_in, prepared.unet.shifts(t, torch.float32), prepared.unet.folded(context)
    compiled = torch.compile(prepared.unet.predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), prepared.unet.predict(*args), rtol=1e-5, atol=1e-5)
    z = noise("z", 1, 4, 8, 8)
    compiled = torch.compile(prepared.vae.decode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z), prepared.vae.decode(z), rtol=1e-5, atol=1e-5)


def test_copies_go_round():
    x = torch.arange(2)
    assert copies(x, 6).tolist() == [0, 1] * 3
    assert copies(x, 2) is x


# --- whole edits ------------------------------------------------------------------------------------------------------


def photo(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8).astype(np.float32) / 255


EXEMPLAR = Image.fromarray((photo(40, 30, seed=1) * 255).astype(np.uint8))


def ordinary_edit(monkeypatch, *args, **options):
    """`pbe.edit` without any of the faster forms."""
    with monkeypatch.context() as patch:
        patch.setattr("pbe.editing.edit.prepare_for_inference", lambda model: model)
        return pbe.edit(*args, **options)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_edits_are_the_same_pictures(monkeypatch, guidance, consume):
    """To 1e-3 of full scale in float32, for a model, a prepared one, and one that was given up for it."""
    model = make_model(TINY)
    args = photo(83, 70), (20, 20, 60, 50), EXEMPLAR
    options = {"steps": 5, "guidance": guidance, "num_images": 3, "batch_size": 2}
    expected = ordinary_edit(monkeypatch, model, *args, **options)
    results = pbe.edit(prepare_for_inference(copy.deepcopy(model), consume=consume), *args, **options)
    again = pbe.edit(model, *args, **options)
    for one, two, reference in zip(results, again, expected, strict=True):
        assert np.abs(one - reference).max() < 1e-3
        assert np.abs(two - reference).max() < 1e-3
    assert np.abs(expected[0] - expected[1]).max() > 0.05  # another seed is another picture


def test_an_edit_sees_weights_that_changed_since_the_last():
    model = make_model(TINY)
    args = photo(64, 64), (20, 20, 60, 50), EXEMPLAR
    (before,) = pbe.edit(model, *args, steps=4)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn1.to_q.weight", "upsample.conv.weight", "attn2.to_v.weight")):
            parameter.mul_(-1)
    (after,) = pbe.edit(model, *args, steps=4)
    (prepared,) = pbe.edit(prepare_for_inference(model), *args, steps=4)
    assert np.abs(after - before).max() > 1e-2
    assert np.array_equal(after, prepared)


def test_adapters_are_merged():
    model = make_model(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(model, LoRAConfig(rank=2, alpha=4.0), generator):
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    unet_in, t, context = inputs(1, (8, 8), torch.float64)
    expected = ordinary(model, unet_in, t, context)
    assert relative(expected, ordinary(make_model(dtype=torch.float64), unet_in, t, context)) > 1e-2
    # `merged` sums in float32
    assert relative(prepare_for_inference(model).unet(unet_in, t, context), expected) < 1e-6
    assert torch.equal(ordinary(model, unet_in, t, context), expected)  # the model's own are still adapters


# --- who holds which weights ------------------------------------------------------------------------------------------


def storages(module):
    """Bytes of each storage that a module's parameters and packed weights lie in, by its address."""
    tensors = list(module.parameters())
    tensors += [value for m in module.modules() for value in vars(m).values() if isinstance(value, torch.Tensor)]
    plain = [x for x in tensors if x.layout == torch.strided]
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in plain}
    packed = {id(x): x.numel() * x.element_size() for x in tensors if x.layout != torch.strided}
    return found | packed


def test_the_model_stays_as_it_is():
    model = make_model()
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    strides = [p.stride() for p in model.parameters()]
    prepared = prepare_for_inference(model)
    prepared.unet(*inputs(1, (8, 8)))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], values) for name, (values, _) in before.items())
    assert all(after[name].data_ptr() == address for name, (_, address) in before.items())
    assert [p.stride() for p in model.parameters()] == strides
    assert all(p.requires_grad for p in model.parameters())


def test_weights_are_shared():
    """What is new are the summed kernels and the fused projections: here a fifth of the model, at full size 8 %."""
    model = make_model()
    own, prepared = storages(model), storages(prepare_for_inference(model))
    new = sum(size for address, size in prepared.items() if address not in own)
    upsamplings = [m.conv for m in model.modules() if isinstance(m, Upsample | VAEUpsample)]
    attentions = [m.attn1 for m in model.modules() if hasattr(m, "attn1")]
    assert upsamplings
    expected = sum(conv.weight.nbytes * 16 // 9 for conv in upsamplings) + sum(
        3 * attention.to_q.weight.nbytes for attention in attentions
    )
    assert new == expected
    unneeded = sum(p.nbytes for name, p in model.named_parameters() if ".attn2.to_q" in name or ".attn2.to_k" in name)
    assert unneeded
    assert sum(prepared.values()) - new <= sum(own.values()) - unneeded


@pytest.mark.slow
def test_full_size_adds_8_percent_and_leaves_22_million_parameters_out():
    model = build_on_meta(PaintByExample, PaintByExampleConfig())
    own = {id(p) for p in model.parameters()}
    total = sum(p.numel() for p in model.parameters())
    prepared = prepare_for_inference(model)
    held = {id(p): p.numel() for p in prepared.parameters()}
    assert sum(size for i, size in held.items() if i not in own) / total == pytest.approx(0.08, abs=0.01)
    blocks = [m for m in model.unet.modules() if isinstance(m, TransformerBlock)]
    unneeded = [p for b in blocks for m in (b.norm2, b.attn2.to_q, b.attn2.to_k) for p in m.parameters()]
    assert sum(p.numel() for p in unneeded) == pytest.approx(22e6, rel=0.05)
    assert not {id(p) for p in unneeded} & held.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_given_up_leaves_one_copy(dtype):
    """In float64, which oneDNN does not know, the weights become channels-last."""
    model = make_model(dtype=dtype)
    whole = sum(storages(model).values())
    unet_in, t, context = inputs(3, (9, 13), dtype)
    expected, picture = ordinary(model, unet_in, t, context), model.vae.decode(noise("z", 1, 4, 8, 8).to(dtype))
    prepared = prepare_for_inference(model, consume=True)
    gc.collect()
    assert sum(storages(prepared).values()) < 1.15 * whole
    assert not list(model.children())
    with pytest.raises(AttributeError):
        _ = model.unet
    assert relative(prepared.unet(unet_in, t, context), expected) < 1e-5
    assert relative(prepared.vae.decode(noise("z", 1, 4, 8, 8).to(dtype)), picture) < 1e-5
    kinds = {type(m) for m in prepared.unet.modules()}
    if dtype == torch.float64:
        assert nn.Conv2d in kinds
        assert all(
            m.weight.is_contiguous(memory_format=torch.channels_last)
            for m in prepared.unet.modules()
            if isinstance(m, nn.Conv2d)
        )
    elif can_pack(CPU, dtype):
        assert {PackedConv2d, PackedLinear, PackedPointwise} <= kinds
        assert not {nn.Conv2d, nn.Linear} & kinds


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_packed_layers(bias, channels_last):
    x = noise("x", 2, 8, 9, 7)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for kind, size, stride in (
        (PackedConv2d, 3, 1),
        (PackedConv2d, 3, 2),
        (PackedConv2d, 2, 1),
        (PackedPointwise, 1, 1),
    ):
        conv = nn.Conv2d(8, 12, size, stride=stride, padding=size // 3, bias=bias)
        y = kind(conv)(x)
        torch.testing.assert_close(y, conv(x), rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(memory_format=torch.channels_last)
    linear = nn.Linear(7, 12, bias=bias)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


def test_a_model_given_up_never_changes_memory_layout():
    """All feature maps are channels-last from the first convolution on."""
    prepared = prepare_for_inference(make_model(), consume=True)
    maps = []
    for module in prepared.unet.modules():
        module.register_forward_hook(lambda _, __, y: maps.append(y))
    prepared.unet(*inputs(3, (8, 8)))
    maps = [y for y in maps if y.ndim == 4 and y.shape[-1] > 1]
    assert len(maps) > 50
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)


def test_a_prepared_model_is_not_saved_and_not_prepared_again():
    prepared = prepare_for_inference(make_model())
    assert isinstance(prepared, PreparedModel)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        prepared.state_dict()
    for wrong in (prepared, nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=f"not a {type(wrong).__name__}"):
            prepare_for_inference(wrong)
