"""Adapters of others, made by their own packages on the same random weights, change the predicted noise as there."""

import json
from pathlib import Path

import pytest
import torch
from others_adapters import (
    ALL,
    ATTENTION,
    LAYERS,
    LYCORIS_CASES,
    STATE,
    assert_agree,
    draw,
    make_model,
    make_unet,
    peft_unet,
    predict,
    randomise,
    save_by_diffusers,
    save_by_lycoris,
    save_kohya,
)
from safetensors.torch import load_file, save_file

import pbe
from pbe.checkpoints.adapters import add_adapters, layers_of, read_adapter
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.cli.checkpoint import main
from pbe.editing.loading import adapter, load_editor

diffusers = pytest.importorskip("diffusers")

PEFT_CASES = {
    **{name: {"targets": targets} for name, targets in LAYERS.items()},
    "all": {},
    "alpha is the rank": {"lora_alpha": 4},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"attn1.to_q": 2, "conv1": 8}, "alpha_pattern": {"attn1.to_q": 5, "ff.net.2": 1.5}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore:.*queries and keys")
@pytest.mark.parametrize("settings", PEFT_CASES.values(), ids=PEFT_CASES)
def test_files_of_diffusers(tmp_path, settings):
    path, unet = save_by_diffusers(tmp_path, **settings)
    assert_agree(add_adapters(make_model(), path), unet)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*queries and keys")
@pytest.mark.parametrize("name", ["all", "rslora", "patterns", "DoRA"])
@pytest.mark.parametrize("safe", [True, False])
def test_folders_of_peft(tmp_path, name, safe):
    peft = pytest.importorskip("peft")
    unet = make_unet()
    settings = {"r": 4, "lora_alpha": 6.0, "target_modules": ALL, **PEFT_CASES[name]}
    wrapped = peft.get_peft_model(unet, peft.LoraConfig(**settings))
    randomise(wrapped, ["lora_A", "lora_B"])
    wrapped.save_pretrained(tmp_path, safe_serialization=safe)
    assert_agree(add_adapters(make_model(), tmp_path), unet)


@pytest.mark.filterwarnings("ignore:.*queries and keys")
def test_several_add_up_with_their_strengths(tmp_path):
    peft = pytest.importorskip("peft")
    unet = peft_unet(seed=1, adapter="a")
    peft_unet(seed=2, adapter="b", unet=unet, targets=LAYERS["linear"], r=2)
    for name in "ab":
        state = peft.get_peft_model_state_dict(unet, adapter_name=name)
        metadata = unet.peft_config[name].to_dict()
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path / name, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
        )
    unet.set_adapters(["a", "b"], weights=[0.7, -0.4])
    model = add_adapters(make_model(), (tmp_path / "a", 0.7), (tmp_path / "b", -0.4))
    assert_agree(model, unet)
    once_more = add_adapters(add_adapters(make_model(), (tmp_path / "a", 0.7)), (tmp_path / "b", -0.4))
    assert torch.equal(predict(once_more), predict(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*queries and keys")
@pytest.mark.parametrize("settings", LYCORIS_CASES.values(), ids=LYCORIS_CASES)
def test_files_of_lycoris(tmp_path, settings):
    path, unet = save_by_lycoris(tmp_path / "network.safetensors", **settings)
    model = add_adapters(make_model(), path)
    assert len(read_adapter(path, make_model()).updates) == len(layers_of(model))
    assert_agree(model, unet)


# --- what names and shapes may be -------------------------------------------------------------------------


def test_what_has_no_effect_is_counted_and_left_out(tmp_path):
    names = [f"{ATTENTION}{name}" for name in ("attn1.to_q", "attn2.to_q", "attn2.to_k", "attn2.to_v")]
    path = save_kohya(tmp_path / "a.safetensors", names, text=3)
    with pytest.warns(UserWarning, match="3 tensors of a text encoder and 2 queries and keys"):
        model = add_adapters(make_model(), path)
    state = model.state_dict()
    changed = {name for name, x in STATE.items() if not torch.equal(x, state[name])}
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
    assert changed == {f"{block}attn1.to_q.weight", f"{block}attn2.to_v.weight"}


def test_a_first_convolution_of_four_inputs_leaves_the_others(tmp_path):
    model = add_adapters(make_model(), save_kohya(tmp_path / "a.safetensors", ["conv_in"], inputs=4))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    old, new = STATE[name], model.state_dict()[name]
    factors = load_file(tmp_path / "a.safetensors")
    delta = factors["lora_unet_conv_in.lora_up.weight"].flatten(1) @ factors[
        "lora_unet_conv_in.lora_down.weight"
    ].flatten(1)
    assert torch.equal(old[:, 4:], new[:, 4:])
    assert torch.allclose(new[:, :4] - old[:, :4], delta.view(-1, 4, 3, 3), atol=1e-6)
    other = save_kohya(tmp_path / "b.safetensors", ["conv_out"], inputs=4)
    with pytest.raises(CheckpointError, match=r"b\.safetensors does not fit .*out\.2"):
        add_adapters(make_model(), other)


def test_old_names_of_attention_processors(tmp_path):
    names = [f"{ATTENTION}attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    kohya = load_file(save_kohya(tmp_path / "kohya.safetensors", names))
    old = {}
    for name in names:
        module = name.replace("attn1.", "attn1.processor.").replace("to_out.0", "to_out") + "_lora"
        for part in ("down", "up"):
            old[f"{module}.{part}.weight"] = kohya["lora_unet_" + name.replace(".", "_") + f".lora_{part}.weight"]
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    save_file({f"unet.{name}": x for name, x in old.items()}, tmp_path / "old.safetensors")
    expected = predict(add_adapters(make_model(), tmp_path / "kohya.safetensors"))
    for file in ("pytorch_lora_weights.bin", "old.safetensors"):
        assert torch.equal(predict(add_adapters(make_model(), tmp_path / file)), expected)


KEY = "lora_unet_mid_block_resnets_0_time_emb_proj"  # 64 outputs, 128 inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet_down_blocks_9_conv.alpha": torch.ones(())}, "1 tensors of no layer .*down_blocks_9"),
        ({f"{KEY}.lora_down.weight": torch.zeros(2, 127)}, r"lora_down \(2, 127\).*\(64, 128\)"),
        ({f"{KEY}.lora_down.weight": torch.zeros(3, 128)}, r"lora_down \(3, 128\)"),
        ({f"{KEY}.lora_down.weight": torch.zeros(2, 128, dtype=torch.int8)}, "int8"),
        ({f"{KEY}.lora_down.weight": torch.zeros(0, 128), f"{KEY}.lora_up.weight": torch.zeros(64, 0)}, r"\(0, 128\)"),
        (
            {f"{KEY}.lora_down.weight": torch.zeros(200, 128), f"{KEY}.lora_up.weight": torch.zeros(64, 200)},
            "rank is 200",
        ),
        ({f"{KEY}.lora_mid.weight": torch.zeros(2, 2)}, r"lora_mid \(2, 2\)"),
        ({f"{KEY}.alpha": torch.tensor(float("nan"))}, "alpha of .* nan"),
        ({f"{KEY}.alpha": torch.ones(7)}, r"alpha of .* \[1.0, 1.0\]"),
        ({f"{KEY}.dora_scale": torch.ones(63, 1)}, r"magnitude is \(63, 1\)"),
        ({f"{KEY}.hada_w1_a": torch.ones(2, 2)}, "make no LoRA, LoHa or LoKr"),
        ({f"{KEY}.lora_up.weight": torch.full((64, 2), float("inf"))}, "not finite in torch.float32"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, message):
    path = save_kohya(tmp_path / "a.safetensors", ["mid_block.resnets.0.time_emb_proj"], **change)
    model = make_model()
    with pytest.raises(CheckpointError, match=rf"a\.safetensors.*{message}"):
        add_adapters(model, path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in STATE.items())


@pytest.mark.parametrize(
    "settings",
    [
        [],
        {"lora_alpha": "6"},
        {"lora_alpha": 10**400},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(a+)+b": 2}},
        {"alpha_pattern": {"to_q": None}, "lora_alpha": [1]},
        {"alpha_pattern": {str(i): 1 for i in range(2000)}},
        {"peft_type": "LOHA"},
    ],
)
def test_settings_of_peft_that_make_no_sense(tmp_path, settings):
    state = {
        f"base_model.model.conv_in.lora_{x}.weight": y for x, y in (("A", draw(2, 9, 3, 3)), ("B", draw(32, 2, 1, 1)))
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    add_adapters(make_model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=tmp_path.name):
        add_adapters(make_model(), tmp_path)


# --- using them -------------------------------------------------------------------------------------------


def test_removing_gives_back_the_weights_to_the_bit(tiny_checkpoint, tmp_path):
    path = save_kohya(tmp_path / "a.safetensors", [f"{ATTENTION}attn1.to_q", "mid_block.resnets.0.conv1"])
    plain = pbe.load_model(tiny_checkpoint, "cpu")
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    model = pbe.load_model(tiny_checkpoint, "cpu", adapters=[path, (path, -0.25)])
    assert not torch.equal(predict(model), predict(plain))
    assert torch.allclose(predict(model), predict(add_adapters(plain, (path, 0.75))), atol=1e-5)
    for one in (model, plain):
        pbe.remove_adapters(one)
        assert all(torch.equal(x, before[name]) for name, x in one.state_dict().items())
    nothing = add_adapters(model, (path, 0.0))
    assert all(torch.equal(x, before[name]) for name, x in nothing.state_dict().items())
    half = pbe.remove_adapters(add_adapters(pbe.load_model(tiny_checkpoint, "cpu"), path).half())
    assert all(torch.equal(x, before[name].half()) for name, x in half.state_dict().items())


def test_prepared_models_have_them_folded_in(tmp_path):
    path = save_kohya(tmp_path / "a.safetensors", [f"{ATTENTION}attn2.to_v", "up_blocks.0.upsamplers.0.conv"])
    model = add_adapters(make_model(), path)
    prepared = pbe.prepare_for_inference(model)
    assert (predict(prepared) - predict(model)).abs().max() < 1e-5 * predict(model).abs().max()
    with pytest.raises(ValueError, match="PreparedModel takes no adapters"):
        add_adapters(prepared, path)
    with pytest.raises(ValueError, match=r"strength of .*a\.safetensors .* nan"):
        add_adapters(model, (path, float("nan")))


def test_a_model_for_editing_alone_has_them_in_its_precision(tiny_checkpoint, tmp_path):
    path = save_kohya(tmp_path / "a.safetensors", [f"{ATTENTION}attn1.to_q", "up_blocks.0.upsamplers.0.conv"])
    editor = load_editor(tiny_checkpoint, "cpu", "float32", adapters=[path])
    model = pbe.load_model(tiny_checkpoint, "cpu", "float32", [path])
    assert (predict(editor) - predict(model)).abs().max() < 1e-5 * predict(model).abs().max()
    half = load_editor(tiny_checkpoint, "cpu", "bfloat16", adapters=[path])
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:-0.5", ("a.safetensors", -0.5)),
        ("C:/a", ("C:/a", 1.0)),
        ("a:1:0", ("a:1", 0.0)),
        ("3", ("3", 1.0)),
    ],
)
def test_texts_of_a_file_and_its_strength(text, given):
    assert adapter(text) == (Path(given[0]), given[1])


def test_a_file_of_adapters_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.safetensors holds adapters alone"):
        pbe.load_model(save_kohya(tmp_path / "a.safetensors", ["conv_out"]))


def test_the_command_s_old_name_says_the_new_one(capsys):
    with pytest.raises(SystemExit):
        main(["merge-lora", "model.ckpt", "a.ckpt", "--weight", "1", "--out", "out.ckpt"])
    assert "merge-lora is now merge-adapter CHECKPOINT" in capsys.readouterr().err


def test_inspect(tiny_checkpoint, tmp_path, capsys):
    names = [f"{ATTENTION}attn1.to_q", f"{ATTENTION}attn1.to_k", "mid_block.resnets.0.conv1"]
    path = save_kohya(tmp_path / "a.safetensors", names, text=2)
    assert main(["inspect", str(path), "--ckpt", str(tiny_checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("adapters in kohya names, for 3 layers of the UNet")
    assert lines[1:4] == ["  kind: LoRA (3)", "  rank: 2 (3)", "  alpha: 2 (3)"]
    assert set(lines[4].removeprefix("  targets: ").split(", ")) == {
        "attn1.to_q (1)",
        "attn1.to_k (1)",
        "middle_block.in_layers (1)",
    }
    assert "  ss_network_dim: '2'" in lines
    assert lines[-1] == "  not loaded: 2 tensors (a text encoder's)"
    assert main(["inspect", str(path)]) == 2
    assert "a.safetensors does not fit the model" in capsys.readouterr().err
