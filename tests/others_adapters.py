"""Adapters made by others' packages, diffusers, PEFT and LyCORIS, on the same random weights as a small model's."""

from functools import cache

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from pbe.checkpoints.diffusers_layouts import diffusers_unet
from pbe.checkpoints.key_map import KeyMap
from pbe.checkpoints.seeding import seeded_state
from pbe.checkpoints.writing import unet_json
from pbe.models.paint_by_example import PaintByExample

diffusers = pytest.importorskip("diffusers")

LAYERS = {
    "linear": ["to_q", "to_k", "to_v", "to_out.0"],
    "1x1": ["proj_in", "proj_out", "conv_shortcut"],
    "3x3": ["conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"],
    "feed-forward": ["ff.net.0.proj", "ff.net.2"],
    "time": ["time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"],
}
ALL = [name for names in LAYERS.values() for name in names]


STATE = seeded_state(TINY, 0)


def make_model():
    model = PaintByExample(TINY)
    model.load_state_dict(STATE)
    return model.eval()


def make_unet():
    """diffusers' network with the weights of `make_model`."""
    unet, config = diffusers.UNet2DConditionModel.from_config(unet_json(TINY.unet, 8)), TINY.unet
    names = [name for name in STATE if name.startswith("model.diffusion_model.")]
    rules = diffusers_unet(len(config.channel_mult), config.num_res_blocks, config.attention_levels)
    theirs = KeyMap(rules).to_theirs(names)
    unet.load_state_dict({a.removeprefix("unet."): STATE[b.sources[0]].clone() for a, b in theirs.items()})
    return unet.eval().requires_grad_(False)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def predict(model):
    x, t, context = draw(2, 9, 8, 8), torch.tensor([3, 700]), draw(2, 1, 64, seed=1)
    if isinstance(model, PaintByExample):
        return model.unet(x, t, context)
    return model(x, t, encoder_hidden_states=context, return_dict=False)[0]


@cache
def plain_prediction():
    return predict(make_model())


def assert_agree(model, unet):
    ours, theirs, plain = predict(model), predict(unet), plain_prediction()
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * theirs.abs().max()


def randomise(module, words, seed=0):
    """Random values for the parameters whose names hold one of the words: adapters begin as nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if any(word in name for word in words):
            fan_in = max(1, parameter[0].numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5


def peft_unet(seed=0, targets=ALL, adapter="default", unet=None, **settings):
    """diffusers' network with an adapter by PEFT."""
    peft = pytest.importorskip("peft")
    unet = make_unet() if unet is None else unet
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6.0, "target_modules": targets, **settings})
    unet.add_adapter(config, adapter)
    randomise(unet, [f"lora_A.{adapter}", f"lora_B.{adapter}"], seed)
    for name, parameter in unet.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.3 * draw(*parameter.shape))
    return unet


def save_by_diffusers(folder, **settings):
    """A file of adapters, and diffusers' network with them."""
    peft = pytest.importorskip("peft")
    unet = peft_unet(**settings)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors", unet


LYCORIS_CASES = {
    "LoRA": {"algo": "lora", "linear_alpha": 2},
    "LoRA, tucker": {"algo": "lora", "use_tucker": True},
    "LoHa": {"algo": "loha", "linear_alpha": 2},
    "LoHa, tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 1, "factor": 4},
    "LoKr, tucker": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 1, "factor": 4, "use_tucker": True},
    "LoKr, both in factors": {"algo": "lokr", "linear_dim": 1, "linear_alpha": 1, "factor": 4, "decompose_both": True},
    "LoKr, whole": {"algo": "lokr", "full_matrix": True, "linear_alpha": 2},
    "rslora": {"algo": "lora", "linear_alpha": 2, "rs_lora": True},
    "DoRA": {"algo": "lora", "dora_wd": True},
    "DoRA by inputs": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
}


def save_by_lycoris(path, **settings):
    """A file of adapters for all layers, and diffusers' network with them."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    unet = make_unet()
    settings = {"linear_dim": 4, "linear_alpha": 4, **settings}
    wrapper.LycorisNetwork.apply_preset({"target_module": ["UNet2DConditionModel"], "lora_prefix": "lora_unet"})
    network = wrapper.create_lycoris(unet, 1.0, **settings)
    network.apply_to()
    randomise(network, ["lora_", "hada_", "lokr_"])
    network.eval()
    network.save_weights(path, torch.float32, {"ss_network_dim": "4"})
    return path, unet


def save_kohya(path, paths, rank=2, seed=0, text=0, inputs=None, alpha=None, **extra):
    """A file in kohya's names of random factors for diffusers' layers."""
    unet, state = make_unet(), {}
    for i, name in enumerate(paths):
        weight = unet.get_submodule(name).weight
        shape = list(weight.shape)
        shape[1] = inputs or shape[1]
        key = "lora_unet_" + name.replace(".", "_")
        state[f"{key}.lora_down.weight"] = draw(rank, *shape[1:], seed=seed + i, scale=0.2)
        state[f"{key}.lora_up.weight"] = draw(shape[0], rank, *[1] * (len(shape) - 2), seed=seed + 99 + i, scale=0.2)
        state[f"{key}.alpha"] = torch.tensor(float(alpha or rank))
    for i in range(text):
        state[f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.alpha"] = torch.tensor(1.0)
    save_file({**state, **extra}, path, {"ss_network_dim": str(rank)})
    return path


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0."
