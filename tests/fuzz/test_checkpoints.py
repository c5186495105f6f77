import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors")

from fuzz.checkpoints import check, fuzz, seeds

from pbe.checkpoints.formats.opening import Checkpoint


def test_the_seeds_are_sound_files(tmp_path):
    for data in seeds():
        (tmp_path / "x.ckpt").write_bytes(data)
        assert isinstance(check(tmp_path / "x.ckpt"), Checkpoint)


@pytest.mark.slow
def test_five_seconds_of_fuzzing(tmp_path):
    assert fuzz(5, tmp_path) > 0
