import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")

from fuzz import checkpoints, models
from fuzz.running import bounded, fuzz

from pbe.checkpoints.formats.opening import Checkpoint


def test_the_seeds_are_sound_files(tmp_path):
    for data in checkpoints.seeds():
        assert isinstance(checkpoints.check(data, tmp_path), Checkpoint)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_models_are_loaded_before_they_are_changed(tmp_path, name):
    with bounded():
        assert models.check(models.File(models.shapes(name)), tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("module", [checkpoints, models])
def test_five_seconds_of_fuzzing(tmp_path, module):
    assert fuzz(module.files(), module.check, 5, tmp_path) > 0
