"""The autoencoder in strips: equal to the whole, border and all, in less memory, and only for large pictures."""

import itertools
import weakref

import pytest
import torch
from conftest import TINY
from golden_file import noise
from torch.utils._python_dispatch import TorchDispatchMode

from pbe.acceleration import prepare_for_inference, strips
from pbe.checkpoints.seeding import seeded_state
from pbe.models.paint_by_example import PaintByExample
from pbe.models.vae import AutoencoderKL, VAEConfig


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def narrow(monkeypatch):
    """Every picture is taken in strips, of a few rows each."""
    monkeypatch.setattr(strips, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(strips, "STRIP_VALUES", 5000)
    monkeypatch.setattr(strips, "MAX_QUERIES", 7)


def make_model(dtype=torch.float64):
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.to(dtype).eval()


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("size", [(8, 8), (21, 3), (1, 5), (7, 30)])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_to_the_whole_picture(narrow, size, batch):
    """In float64 to its rounding: statistics, attention and the rows at each seam and border."""
    vae = make_model().vae
    striped = strips.StripVAE(vae)
    z = noise("z", batch, 4, *size).double()
    torch.testing.assert_close(striped.decode(z), vae.decode(z), rtol=1e-10, atol=1e-10)
    image = noise("image", batch, 3, 4 * size[0] - 1, 4 * size[1]).double()  # sides that are padded
    for ours, theirs in zip(striped.encode(image), vae.encode(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_strips_without_any_variance(narrow):
    """As of a masked picture, whose repainted part is all 0."""
    vae = make_model().vae
    image = noise("image", 1, 3, 64, 32).double()
    image[:, :, 16:] = 0
    torch.testing.assert_close(strips.StripVAE(vae).encode(image).mean, vae.encode(image).mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, None)])
def test_prepared_models(narrow, dtype, tolerance, consume):
    """With summed kernels and packed weights; 16 bits come as near to float64 as the whole picture does."""
    exact, model = make_model().vae, make_model(dtype)
    z, image = noise("z", 1, 4, 16, 12).double(), noise("image", 1, 3, 64, 48).double()
    picture, latent = exact.decode(z), exact.encode(image).mean
    whole = relative(model.vae.decode(z.to(dtype)), picture), relative(model.vae.encode(image.to(dtype)).mean, latent)
    prepared = prepare_for_inference(model, consume=consume)
    in_strips = (
        relative(prepared.vae.decode(z.to(dtype)), picture),
        relative(prepared.vae.encode(image.to(dtype)).mean, latent),
    )
    for ours, theirs in zip(in_strips, whole, strict=True):
        assert ours < (tolerance or 1.5 * theirs)


def test_many_strips_and_not_one(narrow):
    x = noise("x", 1, 32, 64, 24)
    rows = list(strips.strips(x))
    assert len(rows) > 5
    assert rows[0].start == 0
    assert rows[-1].stop == 64
    assert all(a.stop == b.start for a, b in itertools.pairwise(rows))
    assert all(r.start % 2 == 0 for r in rows)


def test_small_pictures_go_through_whole_and_large_batches_in_parts(monkeypatch):
    monkeypatch.setattr(strips, "PART_PIXELS", 2 * 32 * 32)
    monkeypatch.setattr(strips, "WHOLE_PIXELS", 3 * 32 * 32)
    vae = make_model(torch.float32).vae
    striped, seen = strips.StripVAE(vae), []
    vae.decoder.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    z = noise("z", 5, 4, 8, 8)
    # another batch size may choose another kernel
    torch.testing.assert_close(striped.decode(z), vae.decode(z), rtol=1e-4, atol=1e-4)
    assert seen == [(2, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 8), (5, 4, 8, 8)]
    seen.clear()
    assert torch.equal(striped.decode(z[:2]), vae.decode(z[:2]))
    assert seen == [(2, 4, 8, 8)] * 2
    seen.clear()
    striped.decode(noise("z", 2, 4, 16, 12))
    assert seen == [(1, 4, 16, 12)] * 2
    seen.clear()
    striped.decode(noise("z", 1, 4, 16, 13))
    assert not seen  # in strips


def test_the_off_switch(narrow):
    model = make_model(torch.float32)
    prepared = prepare_for_inference(model, strips=False, sum_phases=False)
    z = noise("z", 1, 4, 8, 8)
    assert type(prepared.vae) is AutoencoderKL
    assert torch.equal(prepared.vae.decode(z), model.vae.decode(z))


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage.data_ptr())
        return result

    def freed(self, address):
        self.now -= self.sizes.pop(address)


@pytest.mark.parametrize(("network", "whole", "maps"), [("decoder", 6.0, 3), ("encoder", 4.0, 2)])
def test_memory_is_a_blocks_input_and_hidden_map(monkeypatch, network, whole, maps):
    """In feature maps of the picture's size and the first level's channels, of which a strip holds a sixteenth.

    The decoder's last level has twice the channels in its input. Beside the maps lie six strips: a layer's input,
    normalised, and output, each of up to twice the channels.
    """
    monkeypatch.setattr(strips, "STRIP_VALUES", 2**15)
    vae = AutoencoderKL(VAEConfig(channels=32, num_res_blocks=1)).eval()
    x = noise("x", 1, 4, 32, 8) if network == "decoder" else noise("x", 1, 3, 256, 64)
    network = getattr(vae, network)
    in_strips = strips.decode_in_strips if x.shape[1] == 4 else strips.encode_in_strips
    unit = 32 * 256 * 64 * 4
    with PeakMemory() as at_once:
        network(x)
    with PeakMemory() as by_strips:
        in_strips(network, x)
    assert at_once.peak / unit == pytest.approx(whole, abs=0.1)
    assert maps <= by_strips.peak / unit < maps + 6 / 16
