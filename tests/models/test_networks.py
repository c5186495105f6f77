"""What every network promises beside its numbers: any size, any precision, any memory format, no graph breaks."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from golden_file import noise

from pbe.checkpoints.seeding import seeded_state
from pbe.models.attention import MAX_SCORES, attention
from pbe.models.clip import CLIPTextConfig, CLIPTextTower, CLIPVisionConfig, CLIPVisionTower
from pbe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import PaintByExample, latent_mask
from pbe.models.unet import UNet, UNetConfig, timestep_embedding
from pbe.training.initialization import seeded

THREE_LEVELS = UNetConfig(model_channels=32, channel_mult=(1, 1, 2), num_res_blocks=1, context_dim=64)


@pytest.fixture
def model():
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.eval()


def calls(model):
    """One call of each network, as (name, module or method, arguments)."""
    vision = TINY.exemplar.vision.image_size
    return [
        ("unet", model.unet, (noise("x", 2, 9, 8, 8), torch.tensor([1, 900]), noise("c", 2, 1, 64))),
        ("encode", model.vae.moments, (noise("image", 2, 3, 32, 32),)),
        ("decode", model.vae.decode, (noise("z", 2, 4, 8, 8),)),
        ("exemplar", model.encode_exemplar, (noise("exemplar", 2, 3, vision, vision),)),
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (13, 5), (5, 3), (3, 16)])
def test_unet_takes_any_size(size):
    unet = UNet(THREE_LEVELS)
    eps = unet(noise("x", 1, 9, *size), torch.tensor([5]), noise("c", 1, 1, 64))
    assert eps.shape == (1, 4, *size)
    assert eps.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 30), (1, 50)])
def test_vae_takes_any_size(model, size):
    """A picture's latent covers it; what it decodes to begins with the picture's own pixels."""
    f = TINY.vae.downsampling
    image = noise("image", 1, 3, *size)
    z = model.vae.encode(image).mean
    assert z.shape == (1, 4, -(-size[0] // f), -(-size[1] // f))
    assert model.vae.decode(z).shape == (1, 3, z.shape[2] * f, z.shape[3] * f)
    assert latent_mask(torch.ones(1, 1, *size), f).shape == (1, 1, *z.shape[2:])
    # the padding continues the picture's edge, so a picture padded by hand gives the same latent
    H, W = z.shape[2] * f, z.shape[3] * f
    rows, columns = torch.arange(H).clamp(max=size[0] - 1), torch.arange(W).clamp(max=size[1] - 1)
    assert torch.equal(model.vae.encode(image[:, :, rows][:, :, :, columns]).mean, z)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision(model, dtype, tolerance):
    """16-bit results stay within a few of their roundings (2^-8 and 2^-11) of float32's."""
    expected = {name: network(*args) for name, network, args in calls(model)}
    for name, network, args in calls(model.to(dtype)):
        halved = [a.to(dtype) if a.is_floating_point() else a for a in args]
        result = network(*halved)
        assert result.dtype == dtype
        error = (result.float() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, name


@torch.no_grad()
def test_channels_last(model):
    expected = {name: network(*args) for name, network, args in calls(model)}
    for name, network, args in calls(model.to(memory_format=torch.channels_last)):
        args = [a.to(memory_format=torch.channels_last) if a.ndim == 4 else a for a in args]
        assert torch.allclose(network(*args), expected[name], atol=1e-4), name


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "encode", "decode", "exemplar"])
def test_compiles_without_graph_breaks(model, name):
    """Traced as one graph; the eager backend runs it, since what is tested is the tracing."""
    network, args = next((network, args) for n, network, args in calls(model) if n == name)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*args), network(*args), atol=1e-5)


@torch.no_grad()
def test_text_tower_compiles_and_is_causal():
    config = CLIPTextConfig(width=64, num_layers=2, num_heads=2, vocab_size=30, context_length=12, mlp_width=64)
    tower = CLIPTextTower(config)
    tokens = torch.tensor([[1, 5, 7, 29, 2, 3]])
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(tokens), tower(tokens), atol=1e-5)
    later = tokens.clone()
    later[0, 4] = 9
    assert torch.equal(tower(tokens)[:, :4], tower(later)[:, :4])
    assert not torch.equal(tower(tokens)[:, 4:], tower(later)[:, 4:])
    assert torch.equal(tower.pooled(tokens), tower(tokens)[:, 3])
    with pytest.raises(ValueError, match="at most 12"):
        tower(torch.zeros(1, 13, dtype=torch.long))


def test_vision_tower_names_the_size_it_takes():
    tower = CLIPVisionTower(CLIPVisionConfig(64, 1, 1, 14, 28, 64))
    with pytest.raises(ValueError, match=r"28x28.*not 56x28"):
        tower(torch.zeros(1, 3, 28, 56))


def test_timestep_embedding_is_float32_whatever_the_network():
    """In half precision the angles of late timesteps would be off by whole turns."""
    t = torch.tensor([999])
    assert timestep_embedding(t, 32).dtype == torch.float32
    exact = torch.tensor([999.0], dtype=torch.float64) * 10_000 ** (-torch.arange(16, dtype=torch.float64) / 16)
    assert torch.allclose(timestep_embedding(t, 32)[0, :16].double(), exact.cos(), atol=1e-4)


@torch.no_grad()
def test_all_tokens_as_context(model):
    """The bottleneck's ablation: the class token's neighbours pass too, and with one mapper block change it."""
    config = replace(TINY, exemplar=replace(TINY.exemplar, tokens="all"))
    wide = PaintByExample(config)
    wide.load_state_dict(model.state_dict())
    exemplar = noise("exemplar", 2, 3, 28, 28)
    narrow_context, context = model.encode_exemplar(exemplar), wide.encode_exemplar(exemplar)
    assert narrow_context.shape == (2, 1, 64)
    assert context.shape == (2, 5, 64)
    assert not torch.allclose(context[:, :1], narrow_context, atol=1e-3)
    x = noise("x", 2, 9, 8, 8)
    assert wide.unet(x, torch.tensor([3, 4]), context).shape == (2, 4, 8, 8)


def test_heads_must_divide_the_channels():
    for config in (UNetConfig, CLIPVisionConfig, CLIPTextConfig):
        with pytest.raises(ValueError, match="num_heads=7"):
            config(num_heads=7)
    with pytest.raises(ValueError, match="1024 channels do not divide into num_heads=3"):
        ExemplarConfig(mapper_heads=3)


def test_unknown_tokens_are_named():
    """They would pass for all."""
    with pytest.raises(ValueError, match="tokens must be 'class' or 'all', got 'cls'"):
        ExemplarConfig(tokens="cls")


def test_mask_must_fit_the_image(model):
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        model.encode_masked(torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 16, 32))


def test_building_draws_nothing_on_meta():
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = PaintByExample(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert not list(model.buffers())


# --- the discriminator -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_layers", "side"), [(2, 34), (3, 70)])
def test_a_logit_s_patch(num_layers, side):
    """The pixels that the convolutions of one logit see; their norms see the whole of the picture, and no other."""
    discriminator = seeded(PatchDiscriminator, DiscriminatorConfig(8, num_layers), seed=0)
    pictures = noise("x", 2, 3, 96, 96)
    logits = discriminator(pictures)
    torch.testing.assert_close(discriminator(pictures[:1]), logits[:1])
    for i, layer in enumerate(discriminator):
        if isinstance(layer, torch.nn.GroupNorm):
            discriminator[i] = torch.nn.Identity()
    x = pictures[:1].requires_grad_()
    middle = logits.shape[-1] // 2
    discriminator(x)[0, 0, middle, middle].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == side


@pytest.mark.parametrize("queries, keys", [(64, 65), (3, 7), (1025, 1024)])  # the last: too many scores to be held
def test_attention_in_training_is_that_of_editing(queries, keys):
    assert queries * keys <= MAX_SCORES or queries == 1025
    leaves = [
        noise(name, 2, 4, n, 16).bfloat16().requires_grad_()
        for name, n in zip("qkv", (queries, keys, keys), strict=True)
    ]
    y = attention(*leaves)
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    with torch.no_grad():
        torch.testing.assert_close(y, attention(*leaves), rtol=0.02, atol=0.02)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(attention(*exact).square().sum(), exact)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient.float() - want).norm() <= 0.02 * want.norm() + 1e-6
