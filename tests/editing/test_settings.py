"""An edit's settings: one list, from which keywords, flags, columns and documentation follow."""

import argparse
import inspect
from typing import get_args, get_type_hints

import numpy as np
import pytest

import pbe
from pbe.batch.job import COLUMNS
from pbe.cli.edit import parser
from pbe.cli.flags import add_settings, flag
from pbe.editing.settings import (
    MAX_SEED,
    SETTINGS,
    EditKeywords,
    EditSettings,
    SamplerName,
    quick_settings,
    setting_docs,
)
from pbe.sampling import SAMPLERS


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
    for value in ([], {}, object(), float("nan"), "x", b"1", [[1]], True if name != "composite" else 2):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            EditSettings(**{name: value})
        with pytest.raises(ValueError, match=f"^{name} must be "):
            EditSettings.from_texts({name: value})


def test_the_demo_has_its_own_quick_settings(tiny_checkpoint):
    assert (quick_settings("demo").guidance, quick_settings(tiny_checkpoint).guidance) == (3, 5)
