"""Models given up for their prepared form: converted on the way, with nothing of their file left in memory."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from golden_file import noise

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.checkpoints.formats.lazy_tensors import release_mapped
from pbe.checkpoints.formats.opening import open_checkpoint
from pbe.checkpoints.seeding import seeded_checkpoint, seeded_state
from pbe.editing.loading import load_editor

reads_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A file of 54 MB: most of its tensors are many pages long."""
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    torch.save(seeded_checkpoint("small", seed=0), path)
    return path


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    inside, kib = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:  # a mapping's first line: addresses, …, path
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib * 1024


def read_all(model: torch.nn.Module) -> float:
    return sum(p.detach()[..., ::64].float().sum().item() for p in model.parameters())


@pytest.mark.slow
@reads_proc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_s_pages_go_as_its_layers_are_packed(small, dtype):
    """What stays are norms, biases, pages that tensors share, and in float32 what is not packed: the encoder."""
    model = pbe.load_model(small, device="cpu", dtype="stored")
    read_all(model)
    whole = resident(small)
    assert whole > 0.9 * small.stat().st_size  # the measure itself works
    encoder = sum(p.nbytes for p in model.cond_stage_model.parameters())
    prepared = prepare_for_inference(model, consume=True, dtype=dtype)
    read_all(prepared)
    left = resident(small) - (encoder if dtype == torch.float32 else 0)
    # at full size, where tensors are longer, it is less
    assert left < 0.2 * (whole - encoder)


def test_converted_on_the_way_or_before_is_the_same(small):
    """Bit for bit, but for summed kernels, which are now rounded once instead of twice and left out here."""
    before = prepare_for_inference(pbe.load_model(small, "cpu", "bfloat16"), consume=True, sum_phases=False)
    model = pbe.load_model(small, "cpu", "stored")
    prepared = prepare_for_inference(model, consume=True, dtype=torch.bfloat16, sum_phases=False)
    assert prepared.dtype == torch.bfloat16
    assert {p.dtype for p in prepared.parameters()} == {torch.bfloat16}
    inputs = noise("x", 1, 9, 8, 8).bfloat16(), torch.tensor([500]), noise("c", 2, 1, 768).bfloat16()
    exemplar, z = noise("e", 1, 3, 224, 224).bfloat16(), noise("z", 1, 4, 4, 4).bfloat16()
    with torch.no_grad():
        assert torch.equal(prepared.unet(*inputs), before.unet(*inputs))
        assert torch.equal(prepared.encode_exemplar(exemplar), before.encode_exemplar(exemplar))
        assert torch.equal(prepared.vae.decode(z), before.vae.decode(z))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_editor_is_of_the_asked_precision(tiny_checkpoint, dtype):
    assert {p.dtype for p in load_editor(tiny_checkpoint, "cpu", dtype).parameters()} == {getattr(torch, dtype)}


def test_another_precision_is_for_a_model_given_up(tiny_checkpoint):
    model = pbe.load_model(tiny_checkpoint, device="cpu")
    with pytest.raises(ValueError, match="consume=True"):
        prepare_for_inference(model, dtype=torch.bfloat16)
    assert model.dtype == torch.float32


def test_released_tensors_are_read_again(small):
    checkpoint = open_checkpoint(small)
    name = max(checkpoint.names(), key=lambda n: checkpoint.shape(n).numel())
    tensor = checkpoint.tensor(name)
    before = tensor.clone()
    release_mapped(tensor)
    assert torch.equal(tensor, before)


def test_what_was_changed_or_lies_elsewhere_is_not_released(small):
    """A trained weight that somebody keeps is not the file's any more."""
    model = pbe.load_model(small, device="cpu", dtype="stored")
    weights = dict(model.unet.named_parameters())
    name = max(weights, key=lambda n: weights[n].numel())
    with torch.no_grad():
        weights[name].mul_(2)
    changed = weights[name].detach().clone()
    state = model.state_dict()
    prepare_for_inference(model, consume=True)
    assert torch.equal(state[f"model.diffusion_model.{name}"], changed)

    own = torch.arange(1 << 16)
    release_mapped(own)
    assert torch.equal(own, torch.arange(1 << 16))


def test_a_model_is_loaded_within_inference_mode_too(tiny_checkpoint):
    with torch.inference_mode():
        model = load_editor(tiny_checkpoint, "cpu")
        inputs = noise("x", 1, 9, 8, 8), torch.tensor([500]), noise("c", 1, 1, 64)
        assert torch.equal(model.unet(*inputs), load_editor(tiny_checkpoint, "cpu").unet(*inputs))
    with torch.no_grad():
        assert torch.equal(model.unet(*inputs), load_editor(tiny_checkpoint, "cpu").unet(*inputs))


def test_a_model_in_memory_of_its_own_is_given_up_layer_by_layer():
    """No list of the weights lives on: each is freed with the layer that it was packed from."""
    import weakref

    from pbe.acceleration import prepare as module
    from pbe.models.paint_by_example import PaintByExample

    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    weight = weakref.ref(model.unet.input_blocks[0][0].weight)
    seen = []

    def convert(*args):
        seen.append(weight() is None)
        return original(*args)

    original = module.convert
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "convert", convert)
        prepare_for_inference(model, consume=True)
    assert seen == [True]
