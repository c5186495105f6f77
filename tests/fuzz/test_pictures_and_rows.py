import pytest

pytest.importorskip("hypothesis")

from fuzz import pictures, rows
from fuzz.running import fuzz


def test_the_seeds_are_sound_pictures(tmp_path):
    for data in pictures.seeds():
        (tmp_path / "x.png").write_bytes(data)
        assert pictures.read_picture(tmp_path / "x.png").size == pictures.upright_size(tmp_path / "x.png")
        pictures.check(data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("module", [pictures, rows])
def test_five_seconds_of_fuzzing(tmp_path, module):
    assert fuzz(module.files(), module.check, 5, tmp_path) > 0
