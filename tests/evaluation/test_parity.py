"""`pbe verify`: this library beside diffusers, on right files and on damaged ones."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from marks import rest_slow

from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import save_diffusers
from pbe.cli import checkpoint
from pbe.cli.verify import main
from pbe.io.checksums import sha256_of

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CONFIG = replace(TINY, exemplar=replace(TINY.exemplar, vision=replace(TINY.exemplar.vision, num_layers=4)))


def write(path, state, config=CONFIG):
    torch.save({"state_dict": state, "pbe": pbe_entry(config)}, path)
    return path


def verify(path, capsys):
    """The exit code, what is printed, and by output whether the table says that both agree."""
    code = main([str(path)])
    text = capsys.readouterr().out
    rows = re.findall(r"^\| (\S.*?) +\| +([\w.+-]+) \| +([\w.+-]+) \| +([\w.+-]+) \| +(yes|NO) \|$", text, re.MULTILINE)
    assert len(rows) == 11 or code == 2
    return code, text, {name: agrees == "yes" for name, *_, agrees in rows}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_right_files_agree(tmp_path, capsys, dtype):
    """Also in halves, which both sides compute with in float32."""
    path = write(tmp_path / "model.ckpt", seeded_state(CONFIG, 1, dtype))
    code, text, agrees = verify(path, capsys)
    assert code == 0
    assert all(agrees.values())
    assert text.rstrip().endswith("The two agree.")
    for said in ("pbe ", "diffusers ", sha256_of(path), "Paint by Example, original layout", str(CONFIG.unet)):
        assert said in text


@pytest.mark.slow
def test_a_folder_is_read_by_diffusers_itself(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "folder"
    save_diffusers(seeded_state(CONFIG, 1), CONFIG, folder)
    monkeypatch.setattr("pbe.evaluation.parity.save_diffusers", None)
    code, text, _ = verify(folder, capsys)
    assert code == 0
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "image_encoder/model"):
        assert sha256_of(folder / f"{part}.safetensors") in text


@pytest.mark.parametrize(
    ("tensor", "outputs"),
    rest_slow(
        [
            ("first_stage_model.encoder.mid.block_1.conv1.weight", ["VAE, encoding"]),
            ("first_stage_model.decoder.mid.block_1.conv1.weight", ["VAE, decoding", "picture"]),
            ("cond_stage_model.mapper.resblocks.0.mlp.c_proj.weight", ["exemplar encoder"]),
            ("learnable_vector", ["unconditional vector"]),
            ("model.diffusion_model.middle_block.0.out_layers.3.weight", ["UNet, t = 1", "UNet, t = 999", "latents"]),
        ]
    ),
)
def test_a_wrong_conversion_is_seen(tmp_path, capsys, monkeypatch, tensor, outputs):
    """One tensor with its values in another order on diffusers' side."""

    def wrong(tensors, config, folder):
        save_diffusers({**tensors, tensor: tensors[tensor].flip(-1)}, config, folder)

    monkeypatch.setattr("pbe.evaluation.parity.save_diffusers", wrong)
    code, text, agrees = verify(write(tmp_path / "model.ckpt", seeded_state(CONFIG, 1)), capsys)
    assert code == 1
    wrong_ones = [name for name, ok in agrees.items() if not ok]
    for output in outputs:
        assert any(output in name for name in wrong_ones), (output, wrong_ones)
    assert f"The two differ in {', '.join(wrong_ones)}." in text


def test_nan_agrees_with_nothing(tmp_path, capsys):
    state = seeded_state(CONFIG, 1)
    state["first_stage_model.decoder.conv_in.bias"][0] = float("nan")
    code, _, agrees = verify(write(tmp_path / "model.ckpt", state), capsys)
    assert code == 1
    assert [name for name, ok in agrees.items() if not ok] == ["VAE, decoding", "edit of 4 steps, picture"]


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "model.ckpt", seeded_state(CONFIG, 1))
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:-1000])
    all_tokens = replace(CONFIG, exemplar=replace(CONFIG.exemplar, tokens="all"))
    cases = {
        "cut.ckpt": cut,
        "there is no checkpoint": tmp_path / "none.ckpt",
        "mapper blocks": write(tmp_path / "shape.ckpt", seeded_state(TINY, 1), TINY),
        "diffusers has Paint by Example of one token and gray holes": write(
            tmp_path / "all.ckpt", seeded_state(CONFIG, 1), all_tokens
        ),
    }
    for message, file in cases.items():
        assert main([str(file)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main([str(path)]) == 2
    assert "verifying needs diffusers, the extra verify: pip install pbe[verify]" in capsys.readouterr().err


@pytest.mark.slow
def test_full_size(tmp_path, capsys):
    """The released model's sizes with random weights: 11 GB of disk."""
    path = tmp_path / "model.ckpt"
    assert checkpoint.main(["seed", "--size", "full", "--out", str(path)]) == 0
    code, text, _ = verify(path, capsys)
    path.unlink()
    assert code == 0, text
