"""An edit's settings: one list, from which keywords, flags, columns and documentation follow."""

import argparse
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

import pbe
from pbe.baselines import WeightFiles, get_baseline
from pbe.batch.job import COLUMNS
from pbe.cli.edit import parser
from pbe.cli.evaluate import parser as evaluate_parser
from pbe.cli.flags import add_settings, flag
from pbe.editing.settings import (
    ETA_SAMPLERS,
    MAX_LCM_STEPS,
    MAX_SEED,
    SAMPLING,
    SETTINGS,
    EditKeywords,
    EditSettings,
    SamplerName,
    SpacingName,
    quick_settings,
    setting_docs,
    settings_for,
)
from pbe.models.paint_by_example import Distilled
from pbe.sampling import SAMPLERS, SPACINGS
from pbe.sampling.spacing import DISTILLED_TIMESTEPS


def test_the_keywords_for_type_checkers_are_the_settings():
    assert get_type_hints(EditKeywords) == get_type_hints(EditSettings)


def test_settings_name_the_samplers_that_there_are():
    assert set(get_args(SamplerName)) == set(SAMPLERS)


def test_the_signature_of_edit_shows_every_setting_once():
    parameters = inspect.signature(pbe.edit).parameters
    for name in SETTINGS:
        assert parameters[name].default == getattr(EditSettings, name)
    assert set(SETTINGS).isdisjoint(inspect.signature(pbe.edit.__wrapped__).parameters)


def test_every_setting_has_a_line_a_flag_and_a_column():
    docs = setting_docs()
    text = parser().format_help()
    for name in SETTINGS:
        assert docs[name].endswith(".")
        assert flag(name) in text
        assert name in COLUMNS


def test_evaluate_run_has_those_that_pictures_of_a_test_set_follow_from(capsys):
    with pytest.raises(SystemExit):
        evaluate_parser().parse_args(["run", "--help"])
    text, given = capsys.readouterr().out, {"strength": "0.5", "grow": "4", "placement": "bottom"}
    assert all(flag(name) in text for name in SAMPLING)
    assert {*SETTINGS} - {*SAMPLING} == {
        *("seed", "window", "split_mask", "composite", "seam", "feather", "margin"),  # of how it is put into the photo
        *("fit_mask", "invert", "extend"),  # a test set's masks fit
    }
    chosen = get_baseline("paint-by-example").choose_settings(given, WeightFiles(paint_by_example=Path("demo")))
    assert chosen.items() >= {"strength": 0.5, "grow": 4, "placement": "bottom", "smooth": 0}.items()


def test_flags_give_the_settings():
    p = argparse.ArgumentParser()
    add_settings(p)
    args = vars(
        p.parse_args(["--steps", "20", "--no-composite", "--window", "1,2,30,40", "--guidance-interval", "5,9"])
    )
    assert EditSettings.from_texts(args) == EditSettings(
        steps=20, composite=False, window=(1, 2, 30, 40), guidance_interval=(5, 9)
    )
    assert EditSettings.from_texts(vars(p.parse_args([]))) == EditSettings()


def test_json_is_read_back():
    settings = EditSettings(seed=MAX_SEED, window=(0, 0, 8, 8), eta=0.5, sampler="ddim", feather=0, guidance=1e-3)
    assert EditSettings.from_texts(settings.to_json()) == settings
    assert "guidance_interval" not in settings.to_json()


def test_numbers_of_numpy_become_python_s():
    settings = EditSettings(
        steps=np.int64(9), guidance=np.float32(2), window=np.array([0, 0, 8, 8]), composite=np.True_
    )
    assert settings == EditSettings(steps=9, guidance=2.0, window=(0, 0, 8, 8), composite=True)
    assert [type(value) for value in (settings.steps, settings.guidance, settings.composite)] == [int, float, bool]


@pytest.mark.parametrize("name", SETTINGS)
def test_nonsense_is_refused_by_name(name):
    for value in ([], {}, object(), float("nan"), "x", b"1", [[1]], 2 if SETTINGS[name] is bool else True):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            EditSettings(**{name: value})
        with pytest.raises(ValueError, match=f"^{name} must be "):
            EditSettings.from_texts({name: value})


def test_the_demo_has_its_own_quick_settings(tiny_checkpoint):
    assert (quick_settings("demo").guidance, quick_settings(tiny_checkpoint).guidance) == (2, 5)


@pytest.mark.parametrize(
    "value", ["left,200,top,5", "left 200; top 5", ["left", 200, "top", 5], [["left", 200], ["top", 5]]]
)
def test_sides_are_texts_or_pairs(value):
    sides = (("left", 200), ("top", 5))
    assert EditSettings(extend=value).extend == sides
    assert EditSettings.from_texts({"extend": value}).extend == sides
    assert EditSettings.from_texts(json.loads(json.dumps(EditSettings(extend=value).to_json()))).extend == sides


@pytest.mark.parametrize(
    ("strength", "steps", "taken"),
    [(1, 50, 50), (0.5, 50, 25), (0.3, 10, 3), (0.31, 10, 4), (1e-12, 1, 1), (0.999, 9, 9)],
)
def test_strength_is_a_share_of_the_steps(strength, steps, taken):
    assert EditSettings(strength=strength, steps=steps).steps_taken == taken


# --- distilled models -------------------------------------------------------------------------------------------------

LCM = Distilled("lcm", steps=4, guidance=1.0)


def test_what_is_not_given_is_what_the_model_was_distilled_for():
    assert settings_for({}) == EditSettings()
    assert settings_for({}, LCM) == EditSettings(sampler="lcm", steps=4, guidance=1.0, spacing="lcm")
    assert settings_for({"steps": 2, "seed": 7}, LCM) == EditSettings(
        sampler="lcm", steps=2, guidance=1.0, spacing="lcm", seed=7
    )
    quick = EditSettings(sampler="dpm_solver", spacing="trailing", steps=20, margin=0.2)
    assert settings_for({"sampler": "dpm_solver"}, LCM, quick) == replace(quick, steps=4, guidance=1.0)
    assert settings_for({}, LCM, quick) == replace(settings_for({}, LCM), margin=0.2)
    assert EditSettings.from_texts({"steps": " 8", "sampler": None}, LCM) == settings_for({"steps": 8}, LCM)


def test_a_sampler_brings_its_spacing_and_noise():
    assert settings_for({"sampler": "lcm", "steps": 4}).spacing == "lcm"
    tcd = settings_for({"sampler": "tcd", "steps": 4})
    assert (tcd.spacing, tcd.eta) == ("lcm", 0.3)
    assert settings_for({"sampler": "tcd", "steps": 4, "eta": 0.0}).eta == 0
    assert settings_for({"sampler": "ddim"}) == EditSettings(sampler="ddim")
    assert EditSettings.from_texts(tcd.to_json()) == tcd  # as a result's provenance has it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "lcm"}, "the sampler 'lcm' needs spacing='lcm', got 'leading'"),
        ({"sampler": "tcd", "spacing": "trailing"}, "the sampler 'tcd' needs spacing='lcm', got 'trailing'"),
        ({"sampler": "lcm", "spacing": "lcm", "steps": 51}, "spacing='lcm' has 50 timesteps, got steps=51"),
        ({"sampler": "plms", "spacing": "karras"}, "'plms' needs even steps, as spacing='trailing' has, got 'karras'"),
        ({"sampler": "lcm", "spacing": "lcm", "steps": 4, "eta": 0.3}, "'ddim' and 'tcd' alone, not for 'lcm'"),
        ({"strength": 0}, "strength must be a number above 0 and at most 1, got 0"),
        ({"extend": "up,3"}, "extend must be sides, each once, .* such as left,200 .*, got 'up,3'"),
        ({"extend": "left,3,left,4"}, "extend must be sides, each once, .* got left,3,left,4"),
        ({"extend": "left,0"}, "with 1 to 30000 pixels, .* got 'left,0'"),
        ({"extend": "left,3", "placement": "bottom"}, "placement='bottom' would leave a part of what extend adds"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        EditSettings(**settings)


def test_settings_know_what_the_samplers_are():
    assert set(get_args(SpacingName)) == set(SPACINGS)
    assert set(ETA_SAMPLERS) == {name for name, sampler in SAMPLERS.items() if sampler.noise == "eta"}
    assert MAX_LCM_STEPS == DISTILLED_TIMESTEPS
