"""Configs: the YAML files are whole and say what they are meant to, and a mistake is one line that names the key."""

import itertools
from dataclasses import fields
from pathlib import Path

import pytest

from pbe.cli.train import main
from pbe.io.fields import field_docs
from pbe.training.callbacks.checkpoints import CheckpointConfig
from pbe.training.callbacks.samples import SamplesConfig
from pbe.training.config import RENAMED, PaintByExampleRun, VAERun, load_config, save_config, to_dict
from pbe.training.initialization import ModelConfig
from pbe.training.module import TrainingConfig
from pbe.training.optimizer import OptimizerConfig, PartOptimizerConfig
from pbe.training.run import check_trainer
from pbe.training.tiny_decoder import TinyDecoderConfig
from pbe.training.vae import AdversarialConfig, PerceptualConfig, VAETrainingConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_files_are_whole(name, tmp_path):
    config = load_config([str(CONFIGS / name)])
    check_trainer(config.trainer)
    assert config.trainer.get("max_steps", config.trainer.get("max_epochs", 0)) > 0  # they end
    save_config(config, tmp_path / "config.yaml")
    assert load_config([str(tmp_path / "config.yaml")]) == config


@pytest.mark.slow
def test_runs_have_folders_of_their_own():
    runs = [load_config([str(CONFIGS / name)]).run for name in FILES]
    assert len(set(runs)) == len(runs)


def test_paper_s_recipe():
    config = load_config([str(CONFIGS / "paint_by_example.yaml")])
    optimizer, training = config.optimizer, config.training
    assert (optimizer.lr, optimizer.weight_decay) == (1e-5, 0.01)
    assert (optimizer.warmup_steps, optimizer.warmup_start, optimizer.decay_steps) == (10_000, 1e-6, None)
    assert set(training.train) == {"unet", "mapper", "final_ln", "proj_out", "null_context"}
    assert (training.drop_exemplar, training.ema_decay) == (0.2, None)
    assert (config.data.batch_size, config.trainer["max_epochs"], config.data.recipe.resolution) == (4, 40, 512)


@pytest.mark.parametrize("folder", ["ablation", "ablation/tiny"])
def test_ablation_s_steps_differ_in_one_switch(folder):
    """Beside the run's folder, and the scale of guidance that the last step is about."""
    names = ("1_naive", "2_prior", "3_augmentation", "4_bottleneck", "5_guidance")
    steps = [flat(to_dict(load_config([str(CONFIGS / folder / f"{name}.yaml")]))) for name in names]
    switches = [
        {key for key in {**a, **b} if a.get(key) != b.get(key)} - {"run", "samples.edit.guidance"}
        for a, b in itertools.pairwise(steps)
    ]
    # at the small size the start from scratch needs sizes and an autoencoder, which the prior's file brings
    start = {"model.reset"} if folder == "ablation" else {"model.init", "model.vae"}
    assert {key for key in switches[0] if not key.startswith("model.size.")} == start
    assert switches[1:] == [{"data.recipe.augment"}, {"model.tokens"}, {"training.drop_exemplar"}]


def flat(settings, prefix=""):
    """Nested settings by dotted key."""
    result = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_ablation_ends_in_the_paper_s_recipe():
    paper, last = (load_config([str(CONFIGS / name)]) for name in ("paint_by_example.yaml", "ablation/5_guidance.yaml"))
    a, b = flat(to_dict(paper)), flat(to_dict(last))
    assert {key for key in a if a[key] != b[key]} == {"run", "model.tokens"}  # said, where the recipe leaves it


@pytest.mark.parametrize(
    "owner",
    [
        TrainingConfig,
        VAETrainingConfig,
        PerceptualConfig,
        AdversarialConfig,
        TinyDecoderConfig,
        OptimizerConfig,
        PartOptimizerConfig,
        ModelConfig,
        CheckpointConfig,
        SamplesConfig,
    ],
)
def test_every_setting_is_documented_under_its_field(owner):
    assert field_docs(owner).keys() == {field.name for field in fields(owner)}


def test_sizes_are_tuples():
    """The networks' dataclasses are compared and hashed."""
    size = load_config([str(CONFIGS / "tiny.yaml")]).model.size
    assert size.unet.channel_mult == (1, 2, 2)
    assert hash(size)


def test_task_chooses_the_settings():
    assert isinstance(load_config([str(CONFIGS / "vae.yaml")]), VAERun)
    assert isinstance(load_config([str(CONFIGS / "tiny.yaml")]), PaintByExampleRun)


def test_later_settings_win(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "run: a\nseed: 1\noptimizer: {lr: 0.1, weight_decay: 0.5}\nsamples: {every_n_steps: null}"
    )
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.yaml").write_text("base: ../a.yaml\noptimizer: {lr: 0.2}")
    config = load_config([str(tmp_path / "below" / "b.yaml"), "seed=3", "optimizer.decay_steps=7"])
    assert (config.run, config.seed) == ("a", 3)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.decay_steps) == (0.2, 0.5, 7)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["optimizer.lrr=1"], r"optimizer\.lrr: Key 'lrr' not in 'OptimizerConfig'.*'lr'"),
        (["optimiser.lr=1"], r"optimiser: Key 'optimiser' not in 'PaintByExampleRun'.*'optimizer'"),
        (["optimizer.lr=fast"], r"optimizer\.lr: Value 'fast' of type 'str' could not be converted to Float"),
        (["training.train=unet"], r"training\.train is a list, written \[a, b\]; got unet$"),
        (["model.size.unet.channel_mult=3"], r"model\.size\.unet\.channel_mult is a list, written \[a, b\]; got 3$"),
        (["training.train={unet: 1}"], r"training\.train=\{unet: 1\}: Cannot merge incompatible container types"),
        (["training.val_timesteps=null"], r"training\.val_timesteps is a list, written \[a, b\]; got None"),
        (["training.train=[unet,vae]"], r"training\.train\[1\]: Invalid value 'vae', expected one of"),
        (["model.size.unet.model_chanels=4"], r"model\.size\.unet\.model_chanels: Key"),
        (["task=diffusion"], r"task=diffusion is not one of paint_by_example, vae, tiny-decoder"),
        (["task=vae", "data.val_size=1", "model.init=x"], r"model: Key 'model' not in 'VAERun'"),
        (["run=${nowhere}"], r"run: Interpolation key 'nowhere' not found"),
        (["optimizer.warmup_steps=-1"], r"optimizer\.warmup_steps must be .* at least 0, got -1"),
        (["training.drop_exemplar=20"], r"training\.drop_exemplar must be .* 0 to 1, got 20"),
        (
            ["training.val_timesteps=[1000]"],
            r"training\.val_timesteps must be .*timesteps from 0 to 999.*, got \[1000\]",
        ),
        (["training.train=[]"], r"training\.train is empty"),
        (["checkpoint.keep=0"], r"checkpoint\.keep must be .* at least 1, got 0"),
        (["data.batch_size=0"], r"data\.batch_size must be at least 1, got 0"),
        (["samples.every_n_steps=5"], r"samples are made of validation pictures: set data\.val_size"),
        (["task=vae"], r"measured on validation pictures: set data\.val_size"),
    ],
)
def test_mistakes_name_the_key(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(["samples.every_n_steps=null", *settings] if settings[0] != "task=vae" else settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_of_settings_say_the_new_one(old, new, tmp_path):
    with pytest.raises(ValueError, match=rf"{old} is now called {new}$"):
        load_config([f"{old}=1"])
    (tmp_path / "old.yaml").write_text(to_yaml(old))
    (tmp_path / "later.yaml").write_text("base: old.yaml")
    with pytest.raises(ValueError, match=rf"later.yaml: {old} is now called {new}$"):
        load_config([str(tmp_path / "later.yaml")])


def to_yaml(key):
    """A YAML mapping that sets this dotted key."""
    return "{" + key.replace(".", ": {") + ": 1" + "}" * (key.count(".") + 1)


def test_trainer_s_arguments_are_known():
    with pytest.raises(
        ValueError, match=r"trainer\.devies is not an argument of lightning\.Trainer; did you mean 'devices'"
    ):
        check_trainer({"devies": 8})
    with pytest.raises(ValueError, match=r"trainer\.callbacks is decided by this program"):
        check_trainer({"callbacks": []})


def test_command_line_says_it_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert (
        capsys.readouterr().err == f"error: config {tmp_path / 'none.yaml'} not found; a setting is written key=value\n"
    )
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main([str(tmp_path / "list.yaml")]) == 2
    assert "holds a list; expected settings" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert main([str(tmp_path / "broken.yaml")]) == 2
    assert "broken.yaml" in capsys.readouterr().err


def test_the_recipes_sizes_are_the_models(tmp_path):
    finetune = ["configs/finetune.yaml", "model.init=demo"]
    recipe = load_config(finetune).data.recipe
    assert (recipe.resolution, recipe.exemplar_size, recipe.fit) == (128, 128, "letterbox")
    recipe = load_config([*finetune, "data.recipe.resolution=256", "data.recipe.exemplar_size=null"]).data.recipe
    assert (recipe.resolution, recipe.exemplar_size) == (256, 128)
    unknown = load_config(["configs/finetune.yaml", f"model.init={tmp_path}/gone.ckpt"]).data.recipe
    assert (unknown.resolution, unknown.exemplar_size) == (512, 224)


@pytest.mark.parametrize("setting", ["data.source={kind: coco", "data=" + "[" * 2000, "data.source={path: a b: c}"])
def test_settings_that_are_not_yaml_are_named(setting):
    with pytest.raises(ValueError, match=r"^data\S*=.* cannot be read: "):
        load_config([setting])
