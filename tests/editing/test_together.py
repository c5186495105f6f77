"""Edits that are sampled as one batch are what they are alone."""

import numpy as np
import pytest
import torch

import pbe
from pbe.editing import edit as editing
from pbe.editing import together
from pbe.editing.together import run_together, sampled

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"steps": 3, "sampler": "ddpm", "guidance": 3.0}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return pbe.prepare_for_inference(pbe.load_model(tiny_checkpoint, device="cpu"))


def arguments(i: int, height: int = 80, width: int = 96) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Another photo, mask and exemplar for each number."""
    draw = np.random.default_rng(i)
    photo = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return photo, (10 + i, 20, 40 + i, 44), draw.integers(0, 256, (30, 20 + i, 3), dtype=np.uint8)


def begin(model, i: int, **changes):
    sizes = {name: changes.pop(name) for name in ("height", "width") if name in changes}
    return pbe.edit.begin(model, *arguments(i, **sizes), **{**SETTINGS, "seed": 5 + i, **changes})


def alone(model, i: int, **changes):
    return pbe.edit(model, *arguments(i), **{**SETTINGS, "seed": 5 + i, **changes})


def test_each_is_the_same_as_alone(model, batches):
    together = run_together([begin(model, 0), begin(model, 1, num_images=2), begin(model, 2)])
    assert batches == [4]
    for i, results in enumerate(together):
        expected = alone(model, i, num_images=len(results))
        for result, one in zip(results, expected, strict=True):
            difference = np.abs(result.astype(int) - one)
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.01
    assert not np.array_equal(together[0][0], arguments(0)[0])


def test_strengths_negatives_and_noise_are_each_edit_s_own(model, batches):
    def own(i: int) -> dict:
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"negative": arguments(i + 5)[2], "latents": noise, "strength": 0.7}

    together = run_together([begin(model, i, num_images=1 + i, **own(i)) for i in range(2)])
    assert batches == [3]
    for i, results in enumerate(together):
        for result, one in zip(results, alone(model, i, num_images=1 + i, **own(i)), strict=True):
            assert np.abs(result.astype(int) - one).max() <= 1
    batches.clear()
    run_together([begin(model, 0), begin(model, 0, negative=arguments(5)[2]), begin(model, 1)])
    assert batches == [2, 1]


def test_only_equal_settings_and_sizes_are_one_batch(model, batches):
    edits = [{}, {"steps": 4}, {"window": "full"}, {"seed": 9}, {"height": 200, "window": "full"}, {"guidance": 2}]
    run_together([begin(model, i, **changes) for i, changes in enumerate(edits)])
    assert sorted(batches) == [1, 1, 1, 1, 2]


def test_regions_of_one_edit_follow_each_other(model, batches):
    mask = np.zeros((80, 96), dtype=bool)
    mask[5:25, 5:25] = mask[50:75, 60:90] = True
    photo, _, exemplar = arguments(0)
    settings = {**SETTINGS, "split_mask": True}
    first, second = run_together([pbe.edit.begin(model, photo, mask, exemplar, **settings) for _ in range(2)])
    assert batches == [2, 2]
    np.testing.assert_array_equal(first, second)
    assert (first[0][mask] != photo[mask]).any()


def test_what_a_callback_raises_ends_its_edit_alone(model, batches):
    steps = []

    class Stop(Exception):
        pass

    def stop(step):
        steps.append((step.index, len(step.z_0)))
        raise Stop

    @sampled
    def stopped():
        with pytest.raises(Stop):
            yield from begin(model, 1, callback=stop)
        return "stopped"

    seen = []
    (result,), ended = run_together([begin(model, 0, callback=lambda step: seen.append(step.index)), stopped.begin()])
    assert (ended, steps, seen, batches) == ("stopped", [(0, 1)], [0, 1, 2], [2])
    assert np.abs(result.astype(int) - alone(model, 0)[0]).max() <= 1
    batches.clear()
    with pytest.raises(Stop):
        alone(model, 1, callback=stop)
    assert batches == [1]


def test_what_a_batch_fails_on_is_sampled_one_by_one(model, monkeypatch):
    sizes, sample_latents = [], editing.sample_latents

    def small(model, condition, *others):
        sizes.append(len(condition.z_masked))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample_latents(model, condition, *others)

    monkeypatch.setattr(editing, "sample_latents", small)
    results = run_together([begin(model, 0), begin(model, 1)])
    assert sizes == [2, 1, 1]
    np.testing.assert_array_equal(results[1][0], alone(model, 1)[0])


def test_there_are_no_gradients(model, monkeypatch):
    assert torch.is_grad_enabled()
    enabled = []
    sample = together.sample

    def noted(requests):
        enabled.append(torch.is_grad_enabled())
        return sample(requests)

    monkeypatch.setattr(together, "sample", noted)
    alone(model, 0, callback=lambda step: enabled.append(torch.is_grad_enabled() or step.z_0.requires_grad))
    assert enabled == [False] * 4
