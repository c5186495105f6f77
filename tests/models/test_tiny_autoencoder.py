"""TAESD's networks: the same numbers as diffusers', from its folders and from the original's files."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from marks import rest_slow

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.cli.checkpoint import main
from pbe.editing.loading import load_editor
from pbe.models.paint_by_example import PaintByExampleConfig
from pbe.models.tiny_autoencoder import TinyAutoencoder, TinyConfig, TinyDecoder, TinyEncoder

diffusers = pytest.importorskip("diffusers")

SIZES = [TinyConfig(), TinyConfig(channels=16, latent_channels=5, num_resamplings=2, num_blocks=1)]


def save_theirs(config, folder):
    """diffusers' autoencoder of these sizes with random weights, and its folder."""
    blocks = (config.num_blocks,) * config.num_resamplings
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(config.channels,) * (config.num_resamplings + 1),
        decoder_block_out_channels=(config.channels,) * (config.num_resamplings + 1),
        num_encoder_blocks=(1, *blocks),
        num_decoder_blocks=(*blocks, 1),
    ).eval()
    theirs.save_pretrained(folder)
    return theirs


def save_original(theirs, folder):
    """The same weights as TAESD's own repository has them: a state dict for each network, in its numbers."""
    for network, shift in (("encoder", 0), ("decoder", 1)):
        state = {}
        for name, tensor in getattr(theirs, network).state_dict().items():
            _, number, rest = name.split(".", 2)  # layers.N.…
            state[f"{int(number) + shift}.{rest}"] = tensor
        torch.save(state, folder / f"taesd_{network}.pth")


@torch.no_grad()
@pytest.mark.parametrize("config", SIZES, ids=["taesd", "small"])
def test_both_networks_agree_with_diffusers(tmp_path, config):
    theirs = save_theirs(config, tmp_path / "folder")
    save_original(theirs, tmp_path)
    both = pbe.load_model(tmp_path / "folder", "cpu")
    encoder = pbe.load_model(tmp_path / "taesd_encoder.pth", "cpu")
    decoder = pbe.load_model(tmp_path / "taesd_decoder.pth", "cpu")
    for model, kind in ((both, TinyAutoencoder), (encoder, TinyEncoder), (decoder, TinyDecoder)):
        assert type(model) is kind
        assert model.config == config
    f, generator = config.downsampling, torch.Generator().manual_seed(1)
    z_0 = 4 * torch.randn(2, config.latent_channels, 5, 3, generator=generator)  # beyond the clamp too
    image = torch.rand(2, 3, 4 * f, 6 * f, generator=generator) * 2 - 1
    for mine, expected in (
        (decoder(z_0), theirs.decode(z_0).sample),
        (both.decoder(z_0), theirs.decode(z_0).sample),
        (encoder(image), theirs.encode(image).latents),
        (both.encoder(image), theirs.encode(image).latents),
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    assert encoder(image[..., 1:, :-1]).shape == (2, config.latent_channels, 4, 6)  # sides are continued


def test_the_defaults_are_taesd():
    count = sum(parameter.numel() for parameter in TinyDecoder(TinyConfig()).parameters())
    assert count == 1_222_531


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"18.conv.4.bias": None}, "lacks 1: 18.conv.4.bias"),
        ({"20.weight": torch.zeros(3)}, "lacks"),
        ({"7.conv.0.weight": torch.zeros(64, 64, 3, 3)}, "has no place for"),
        ({"19.weight": torch.zeros(4, 64, 3, 3)}, r"wrong shape in 1: 19.weight \(4, 64, 3, 3\)"),
        ({"vae.weight": torch.zeros(3)}, "1 names that this layout does not have: vae.weight"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, change, message):
    state = {**TinyDecoder(TinyConfig()).state_dict(), **change}
    torch.save({name: x for name, x in state.items() if x is not None}, tmp_path / "taesd.pth")
    with pytest.raises(CheckpointError, match=message):
        pbe.load_model(tmp_path / "taesd.pth", "cpu")


def test_another_activation_is_refused(tmp_path):
    save_theirs(SIZES[1], tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    with pytest.raises(CheckpointError, match=r"act_fn='gelu'; only 'relu'"):
        pbe.load_model(tmp_path / "folder", "cpu")


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    torch.save(TinyDecoder(SIZES[1]).state_dict(), tmp_path / "decoder.pth")
    assert main(["inspect", str(tmp_path / "decoder.pth")]) == 0
    shown = capsys.readouterr().out
    for words in ("TAESD, its decoder", "num_resamplings: 2", "parameters: TAESD 0.0"):
        assert words in shown


# --- beside a model's autoencoder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    """A file of a decoder for the latents of `tiny_checkpoint`'s autoencoder."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("decoder") / "decoder.pth"
    torch.save(TinyDecoder(TinyConfig(channels=8, num_resamplings=2, num_blocks=1)).state_dict(), path)
    return path


IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MASK = np.zeros((64, 64), dtype=bool)
MASK[16:48, 16:48] = True


def draft(model, **settings):
    (result,) = pbe.edit(model, IMAGE, MASK, IMAGE[:30, :40], **{"steps": 4, "decoder": "tiny", **settings})
    return result


@pytest.mark.slow
def test_a_draft_is_the_tiny_decoder_s_picture_of_the_same_latents(tiny_checkpoint, tiny_decoder, monkeypatch):
    model = pbe.load_model(tiny_checkpoint, "cpu", tiny_decoder=tiny_decoder)
    exact = draft(model, decoder="vae")
    assert (draft(pbe.load_model(tiny_checkpoint, "cpu"), decoder="vae") == exact).all()
    whole = {"window": "full", "composite": False}
    drafted = draft(model, **whole)
    assert (drafted != draft(model, decoder="vae", **whole)).any()
    for prepared in (prepare_for_inference(model), load_editor(tiny_checkpoint, "cpu", tiny_decoder=tiny_decoder)):
        assert np.abs(draft(prepared, **whole).astype(int) - drafted).max() <= 1
    monkeypatch.setattr("pbe.acceleration.strips.StripVAE.decode", lambda vae, z_0: model.tiny_decoder(z_0))
    assert (draft(model, decoder="vae", **whole) == drafted).all()


def test_a_draft_needs_a_tiny_decoder(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"decoder='tiny' needs a model with a tiny decoder: --tiny-decoder FILE"):
        draft(pbe.load_model(tiny_checkpoint, "cpu"))


def test_a_decoder_must_fit_the_latents(tiny_checkpoint, tmp_path):
    torch.save(TinyDecoder(TinyConfig()).state_dict(), tmp_path / "taesd.pth")
    with pytest.raises(ValueError, match="latents of 4 channels at 1/8 of a picture's size, not of 4 channels at 1/4"):
        pbe.load_model(tiny_checkpoint, "cpu", tiny_decoder=tmp_path / "taesd.pth")
    with pytest.raises(CheckpointError, match="holds PaintByExample; expected TAESD's decoder"):
        pbe.load_model(tiny_checkpoint, "cpu", tiny_decoder=tiny_checkpoint)
    with pytest.raises(ValueError, match="holds TinyDecoder; a tiny decoder is for Paint by Example"):
        pbe.load_model(tmp_path / "taesd.pth", "cpu", tiny_decoder=tmp_path / "taesd.pth")
    with pytest.raises(ValueError, match="takes latents of 4 channels at 1/8"):
        PaintByExampleConfig(vae=TINY.vae, tiny_decoder=TinyConfig())


@pytest.mark.parametrize("suffix", rest_slow(["safetensors", "ckpt"]))
def test_it_travels_inside_the_model_s_file(tiny_checkpoint, tiny_decoder, tmp_path, suffix):
    both, again = tmp_path / f"both.{suffix}", tmp_path / "again.ckpt"
    assert main(["set-tiny-decoder", str(tiny_checkpoint), str(tiny_decoder), "--out", str(both)]) == 0
    assert main(["slim", str(both), "--out", str(again)]) == 0
    expected = torch.load(tiny_decoder, weights_only=True)
    for path in (both, again):
        model = pbe.load_model(path, "cpu")
        state = model.tiny_decoder.state_dict()
        assert model.config.tiny_decoder == TinyConfig(channels=8, num_resamplings=2, num_blocks=1)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], x) for name, x in expected.items())
    other = TinyDecoder(TinyConfig(channels=4, num_resamplings=2, num_blocks=1))
    torch.save(other.state_dict(), tmp_path / "other.pth")
    assert main(["set-tiny-decoder", str(both), str(tmp_path / "other.pth"), "--out", str(again), "--force"]) == 0
    assert pbe.load_model(again, "cpu").config.tiny_decoder.channels == 4


def test_drafts_on_a_small_card_keep_it_on_the_device(tiny_checkpoint, tiny_decoder):
    prepared = load_editor(tiny_checkpoint, "cpu", "bfloat16", low_memory=True, tiny_decoder=tiny_decoder)
    assert draft(prepared).shape == IMAGE.shape
