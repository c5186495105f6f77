"""The detail adapter's networks: nothing at first, the reference's arithmetic, and the same when prepared."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from detail_model import CONFIG, make_model, own_tensors, with_detail
from diffusers.models.attention_processor import Attention as TheirAttention
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from golden_file import noise
from marks import rest_slow
from torch.utils.flop_counter import FlopCounterMode

from pbe.acceleration import prepare_for_inference
from pbe.acceleration.compiled import compile_regions
from pbe.checkpoints.meta_device import build_on_meta
from pbe.models.detail import (
    DetailAttention,
    DetailConfig,
    Resampler,
    add_detail,
    at_strength,
    detail_parts,
    remove_detail,
)
from pbe.models.lora import layers_of
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.unet import Attention

D = CONFIG.tokens
ALL_TOKENS = replace(TINY, exemplar=replace(TINY.exemplar, tokens="all"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def inputs(model, dtype=torch.float32):
    """Of the UNet for two samples; the context is that of exemplars."""
    context = model.encode_exemplar(noise("e", 2, 3, 28, 28).to(model.dtype))
    return noise("x", 2, 9, 8, 6).to(dtype), torch.tensor([300, 7]), context.to(dtype)


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# --- nothing at first -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, ALL_TOKENS], ids=["one token", "all tokens"])
def test_a_fresh_adapter_changes_nothing(config):
    plain, model = make_model(config), with_detail(config, taught=False)
    unet_in, t, context = inputs(model)
    T = config.exemplar.num_tokens
    assert context.shape[1] == T + D
    assert torch.equal(context[:, :T], plain.encode_exemplar(noise("e", 2, 3, 28, 28)))
    expected = plain.unet(unet_in, t, context[:, :T])
    assert torch.equal(model.unet(unet_in, t, context), expected)
    assert torch.equal(
        model.unet(unet_in, t, model.null_context.repeat(2, 1, 1)),
        plain.unet(unet_in, t, plain.null_context.expand(2, T, -1)),
    )


@pytest.mark.parametrize("config", [TINY, ALL_TOKENS], ids=["one token", "all tokens"])
def test_at_strength_0_it_is_the_model_without_it(config):
    plain, model = make_model(config), with_detail(config)
    unet_in, t, context = inputs(model)
    expected = plain.unet(unet_in, t, context[:, :-D])
    assert torch.equal(model.unet(unet_in, t, at_strength(context, D, 0)), expected)
    assert relative(model.unet(unet_in, t, context), expected) > 0.01
    by_half = at_strength(context, D, 0.5)
    assert relative(model.unet(unet_in, t, by_half), expected) < relative(model.unet(unet_in, t, context), expected)
    assert torch.equal(at_strength(context, D, 1), context)


def test_it_is_taken_out_again():
    plain, model = make_model(), with_detail()
    remove_detail(model)
    assert model.detail is None
    assert model.state_dict().keys() == plain.state_dict().keys()
    unet_in, t, context = inputs(model)
    assert torch.equal(model.unet(unet_in, t, context), plain.unet(unet_in, t, context))
    assert type(model.unet.middle_block[1].transformer_blocks[0].attn2) is Attention


def test_the_model_keeps_its_keys_and_other_adapters_their_layers():
    plain, model = make_model(), with_detail()
    own = own_tensors(model)
    assert model.state_dict().keys() - own.keys() == plain.state_dict().keys()
    assert sum("to_v_detail" in name for name in own) == 4  # a transformer each: down, middle, two up
    assert layers_of(model).keys() == layers_of(plain).keys()


# --- the reference's arithmetic ---------------------------------------------------------------------------------------


def attention(num_context):
    """A layer of 48 channels and 4 heads over contexts of 32."""
    layer = DetailAttention(Attention(48, 32, 4), num_context, D)
    for name, parameter in layer.named_parameters():
        parameter.copy_(noise(name, *parameter.shape) / parameter.shape[-1] ** 0.5)
    return layer


@pytest.mark.parametrize("num_context", [1, 5])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_attention_is_decoupled(num_context, strength):
    layer = attention(num_context)
    x, context = noise("x", 2, 10, 48), noise("c", 2, num_context + D, 32)

    def heads(y):
        return y.view(2, -1, 4, 12).transpose(1, 2)

    q = heads(x @ layer.to_q.weight.T)
    own, detail = context[:, :num_context], context[:, num_context:]
    y = F.scaled_dot_product_attention(q, heads(layer.to_k(own)), heads(layer.to_v(own)))
    y = y + strength * F.scaled_dot_product_attention(
        q, heads(layer.to_k_detail(detail)), heads(layer.to_v_detail(detail))
    )
    expected = layer.to_out(y.transpose(1, 2).reshape(2, 10, 48))
    torch.testing.assert_close(layer(x, at_strength(context, D, strength)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_attention_is_that_of_ip_adapter(scale):
    layer = attention(num_context=1)
    theirs = TheirAttention(48, cross_attention_dim=32, heads=4, dim_head=12)
    processor = IPAdapterAttnProcessor2_0(48, 32, num_tokens=(D,), scale=scale)
    for ours, place in {"to_k_detail": processor.to_k_ip[0], "to_v_detail": processor.to_v_ip[0]}.items():
        place.weight.copy_(getattr(layer, ours).weight)
    theirs.load_state_dict({n: x for n, x in layer.state_dict().items() if "detail" not in n})
    theirs.set_processor(processor)
    x, context = noise("x", 2, 10, 48), noise("c", 2, 1 + D, 32)
    expected = theirs(x, encoder_hidden_states=(context[:, :1], [context[:, None, 1:]]))
    torch.testing.assert_close(layer(x, at_strength(context, D, scale)), expected, rtol=1e-5, atol=1e-6)


THEIR_NAMES = {
    "norm_patches": "ln0",
    "norm_queries": "ln1",
    "queries": "latents",
    "ff.1": "ff.1.net.0.proj",
    "ff.3": "ff.1.net.2",
}


def test_the_resampler_is_that_of_ip_adapter_plus():
    ours = Resampler(DetailConfig(tokens=5, layers=3, width=128), 40, 24)
    theirs = IPAdapterPlusImageProjection(40, 24, hidden_dims=128, depth=3, dim_head=64, heads=2, num_queries=5)
    state = {}
    for name, parameter in ours.named_parameters():
        parameter.copy_(noise(name, *parameter.shape) / parameter.shape[-1] ** 0.5 + name.endswith(("norm.weight",)))
        for mine, other in THEIR_NAMES.items():
            name = name.replace(mine, other)
        state[name] = parameter
    del state["null_tokens"]
    theirs.load_state_dict(state)
    patches = noise("p", 2, 17, 40)
    torch.testing.assert_close(ours(patches), theirs(patches), rtol=1e-5, atol=1e-5)


def test_its_patches_are_those_that_the_class_token_reads():
    """All of CLIP's tokens before the last layer."""
    model = with_detail()
    seen = []
    model.detail.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    exemplar = noise("e", 1, 3, 28, 28)
    model.encode_exemplar(exemplar)
    vision = model.cond_stage_model.vision
    hidden = vision.pre_layrnorm(vision.embeddings(exemplar))
    assert seen[0].shape == (1, TINY.exemplar.vision.num_positions, 64)
    assert torch.equal(seen[0], vision.encoder.layers[0](hidden, False))
    assert torch.equal(vision.tokens(exemplar), vision.encoder(hidden))


@pytest.mark.parametrize(("count", "right"), [(2, "1, 4 or 7"), (5, "1, 4 or 7"), (8, "1, 4 or 7")])
def test_other_numbers_of_tokens_are_refused(count, right):
    model = with_detail()
    for unet in (model.unet, prepare_for_inference(model).unet):
        with pytest.raises(ValueError, match=f"{right} tokens, not {count}"):
            unet(noise("x", 1, 9, 8, 8), torch.tensor([5]), noise("c", 1, count, 64))


@pytest.mark.parametrize("values", [{"width": 100}, {"width": 0}, {"tokens": 0}, {"layers": 0}, {"tokens": 1.5}])
def test_impossible_sizes_are_refused(values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=rf"detail\.{name} must be .*, got {value}"):
        DetailConfig(**values)


# --- prepared ---------------------------------------------------------------------------------------------------------

FORMS = {"shared": {}, "packed": {"consume": True}, "bfloat16": {"consume": True, "dtype": torch.bfloat16}}


@pytest.mark.parametrize("strength", rest_slow([0.5, 0, 1, 2]))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("config", [TINY, ALL_TOKENS], ids=["one token", "all tokens"])
def test_prepared_it_is_the_same(config, form, strength):
    model, plain = with_detail(config), make_model(config)
    unet_in, t, context = inputs(model)
    context = at_strength(context, D, strength)
    expected = model.unet(unet_in, t, context)
    prepared, without = (prepare_for_inference(one, **form) for one in (model, plain))
    dtype = prepared.dtype
    args = unet_in.to(dtype), t, context.to(dtype)
    assert relative(prepared.unet(*args), expected) < (0.03 if dtype == torch.bfloat16 else 1e-5)
    if strength == 0:
        assert torch.equal(prepared.unet(*args), without.unet(*args))
        assert torch.equal(prepared.null_context[:, : without.null_context.shape[1]], without.null_context)


def test_what_it_was_prepared_from_stays_as_it_was():
    model = with_detail()
    args = inputs(model)
    before, state = model.unet(*args), {name: x.clone() for name, x in model.state_dict().items()}
    prepare_for_inference(model)
    assert torch.equal(model.unet(*args), before)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("reuse", [1, 2])
def test_keys_and_values_are_computed_once_for_a_loop(reuse):
    model = with_detail()
    prepared = prepare_for_inference(model)
    unet_in, t, context = inputs(model)
    calls = []
    for module in prepared.unet.modules():
        if hasattr(module, "to_k_detail"):
            module.to_k_detail.register_forward_hook(lambda *_: calls.append(1))
    predict = prepared.unet.bind(context, [300, 7], reuse)
    assert len(calls) == 4
    for _ in range(3):
        result = predict(unet_in, t)
    assert len(calls) == 4
    assert relative(result, model.unet(unet_in, t, context)) < 1e-5


@pytest.mark.slow
def test_at_full_size_it_adds_less_than_a_hundredth_of_the_arithmetic():
    """Of a call with both halves of guidance at 512 pixels; nothing is computed."""
    flops = []
    for tokens in (0, 16):
        model = build_on_meta(PaintByExample, PaintByExampleConfig())
        if tokens:
            add_detail(model, detail_parts(model, DetailConfig(tokens=tokens)), {})
        unet = prepare_for_inference(model).unet
        shifts = unet.shifts(torch.empty(1, device="meta"), torch.float32)
        folded = unet.folded(torch.empty(2, 1 + tokens, 768, device="meta"))
        with FlopCounterMode(display=False) as counter:
            unet.predict(torch.empty(1, 9, 64, 64, device="meta"), shifts, folded)
        flops.append(counter.get_total_flops())
    assert 1.005 < flops[1] / flops[0] < 1.01


@pytest.mark.slow
def test_traced_as_one_graph():
    """Traced only: what runs it is torch as usual."""
    prepared = prepare_for_inference(with_detail())
    unet_in, t, context = inputs(prepared)
    args = unet_in, prepared.unet.shifts(t, torch.float32), prepared.unet.folded(context)
    compiled = torch.compile(prepared.unet.predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), prepared.unet.predict(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_blocks_are_compiled_once_for_each_shape():
    model = with_detail()
    prepared = prepare_for_inference(model)
    compile_regions(prepared.unet, backend="eager")
    args = inputs(model)
    assert relative(prepared.unet(*args), model.unet(*args)) < 1e-5
