"""Adapters written in others' names: their own packages load them, with the same output, and nothing is lost."""

from dataclasses import replace

import pytest
import torch
from others_adapters import (
    ATTENTION,
    LYCORIS_CASES,
    assert_agree,
    make_model,
    make_unet,
    predict,
    save_by_diffusers,
    save_by_lycoris,
    save_kohya,
)
from safetensors.torch import load_file, save_file

from pbe.checkpoints.adapter_writing import write_adapter
from pbe.checkpoints.adapters import add_adapters, read_adapter
from pbe.cli.checkpoint import main
from pbe.models.paint_by_example import Distilled

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:.*queries and keys")

TARGETS = ["attn1.to_q", "attn2.to_out.0", "ff.net.2", "proj_in", "conv1", "conv_in"]
KINDS = {
    "alpha": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn1.to_q": 2, "conv1": 8}, "alpha_pattern": {"attn1.to_q": 5, "ff.net.2": 1.5}},
    "DoRA": {"use_dora": True},
}


def assert_same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def loaded_by_diffusers(path):
    """What `load_lora_weights` makes of a pipeline's network."""
    pipeline, unet = diffusers.StableDiffusionPipeline, make_unet()
    state, alphas, metadata = pipeline.lora_state_dict(path, unet_config=unet.config, return_lora_metadata=True)
    pipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    return unet


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_others_load_what_is_written(tmp_path, settings):
    peft = pytest.importorskip("peft")
    source, unet = save_by_diffusers(tmp_path / "source", targets=TARGETS, **settings)
    model = make_model()
    adapter = read_adapter(source, model)
    write_adapter(adapter, tmp_path / "folder", "peft", model=model)
    write_adapter(adapter, tmp_path / "diffusers.safetensors", "diffusers", model=model)
    expected = predict(unet)

    by_peft = peft.PeftModel.from_pretrained(make_unet(), tmp_path / "folder")
    assert torch.equal(predict(by_peft), expected)
    assert_same_tensors(source, tmp_path / "diffusers.safetensors")
    assert torch.equal(predict(loaded_by_diffusers(tmp_path / "diffusers.safetensors")), expected)

    write_adapter(adapter, tmp_path / "kohya.safetensors", "kohya", model=model)
    for name in ("folder", "kohya.safetensors", "diffusers.safetensors"):
        assert_agree(add_adapters(make_model(), tmp_path / name), unet)
    if settings in (KINDS["alpha"], KINDS["rslora"]):  # diffusers misreads the others in kohya's files
        again = predict(loaded_by_diffusers(tmp_path / "kohya.safetensors"))
        assert (again - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya", "pbe"])
def test_round_trips_are_exact_and_keep_what_stands_beside(tmp_path, format):
    names = [f"{ATTENTION}attn1.to_q", f"{ATTENTION}ff.net.2", "mid_block.resnets.0.conv1", "conv_in"]
    source = save_kohya(tmp_path / "source.safetensors", names, rank=4, alpha=3.0)
    model, distilled = make_model(), Distilled("lcm", 4, 1.0)
    adapter = replace(read_adapter(source, model), distilled=distilled)
    adapter.metadata["pbe"] = {"resolution": 512}
    write_adapter(adapter, tmp_path / "a.safetensors", format, model=model)
    there = read_adapter(tmp_path / "a.safetensors", model)
    write_adapter(there, tmp_path / "b.safetensors", "kohya", model=model)
    back = read_adapter(tmp_path / "b.safetensors", model)
    assert_same_tensors(source, tmp_path / "b.safetensors")
    assert (there.format, there.distilled, back.distilled) == (format, distilled, distilled)
    for one in (there, back):
        assert (one.metadata["ss_network_dim"], one.metadata["pbe"]["resolution"]) == ("4", 512)
    assert "lora" not in back.metadata["pbe"]


@pytest.mark.parametrize("name", ["LoRA, tucker", "LoKr, whole", "DoRA by inputs"])
def test_kinds_that_kohya_s_names_alone_can_hold(tmp_path, name):
    source, _ = save_by_lycoris(tmp_path / "a.safetensors", **LYCORIS_CASES[name])
    model = make_model()
    adapter = read_adapter(source, model)
    write_adapter(adapter, tmp_path / "b.safetensors", "kohya", model=model)
    assert torch.equal(*(predict(add_adapters(make_model(), tmp_path / f"{x}.safetensors")) for x in "ab"))
    for format in ("peft", "diffusers", "pbe"):
        role = {"LoRA": "lora_mid", "LoKr": "lokr_w1", "DoRA": "DoRA by inputs"}[name[:4]]
        with pytest.raises(
            ValueError, match=rf"{format} names cannot hold .*{role}.* of \d+ layers, as model.diff.*kohya"
        ):
            write_adapter(adapter, tmp_path / "c.safetensors", format, model=model)
    assert not (tmp_path / "c.safetensors").exists()


def test_what_else_a_format_cannot_hold(tmp_path):
    model, out = make_model(), tmp_path / "out.safetensors"
    layers = [f"{ATTENTION}attn1.to_q", "conv_in"]
    save_kohya(tmp_path / "ones.safetensors", layers[:1], rank=2)
    save_kohya(tmp_path / "others.safetensors", layers[1:], rank=4)
    mixed = {**load_file(tmp_path / "ones.safetensors"), **load_file(tmp_path / "others.safetensors")}
    save_file(mixed, tmp_path / "mixed.safetensors")
    write_adapter(read_adapter(tmp_path / "ones.safetensors", model), out, "pbe", model=model)
    name = "lora_unet_conv_in"
    save_file({**mixed, f"{name}.alpha": torch.tensor(3.0)}, tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="one rank and alpha for all layers, got 2 and 2, 4 and 3"):
        write_adapter(read_adapter(tmp_path / "mixed.safetensors", model), out, "pbe", model=model, overwrite=True)
    save_file({**mixed, f"{name}.dora_scale": torch.ones(32, 1, 1, 1)}, tmp_path / "mixed.safetensors")
    adapter = read_adapter(tmp_path / "mixed.safetensors", model)
    with pytest.raises(ValueError, match="PEFT has DoRA in all layers, and 1 have none"):
        write_adapter(adapter, out, "diffusers", model=model, overwrite=True)
    with pytest.raises(FileExistsError, match=r"out\.safetensors exists"):
        write_adapter(adapter, out, "kohya", model=model)
    with pytest.raises(FileExistsError, match="is not a folder of PEFT"):
        write_adapter(adapter, tmp_path, "peft", model=model, overwrite=True)
    with pytest.raises(ValueError, match=r"out\.ckpt: .* must end in \.safetensors"):
        write_adapter(adapter, tmp_path / "out.ckpt", "kohya", model=model)


def test_matrices_of_convolutions_are_written_as_convolutions(tmp_path):
    source = save_kohya(tmp_path / "a.safetensors", ["conv_in", f"{ATTENTION[:-21]}proj_in"])
    flat = {name: x.flatten(1) if x.ndim else x for name, x in load_file(source).items()}
    save_file(flat, tmp_path / "flat.safetensors")
    model = make_model()
    write_adapter(read_adapter(tmp_path / "flat.safetensors", model), tmp_path / "b.safetensors", "kohya", model=model)
    assert_same_tensors(source, tmp_path / "b.safetensors")


def test_the_command_converts_and_says_what_it_leaves_out(tiny_checkpoint, tmp_path, capsys):
    source, out = save_kohya(tmp_path / "a.safetensors", ["conv_in"], text=2), tmp_path / "folder"
    arguments = ["convert-adapter", str(source), "--to", "peft", "--ckpt", str(tiny_checkpoint), "--out", str(out)]
    assert main(arguments) == 0
    assert "a.safetensors: 2 tensors of a text encoder are left out" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert main(arguments) == 2
    assert "folder exists; --force replaces it" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
