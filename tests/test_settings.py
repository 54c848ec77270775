"""Each option is declared once: settings, types, signatures and documentation say the same."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_type_hints

import pytest
import torch

import models
from implicitvi import AVB_ELBO, AVBSVI, ImplicitGuide, Settings
from implicitvi.errors import OptionError
from implicitvi.inference.settings import ElboOptions, ElboSettings, Options
from implicitvi.training.options import grouped

TAKERS: list[tuple[type, type, type]] = [(AVBSVI, Settings, Options), (AVB_ELBO, ElboSettings, ElboOptions)]


@pytest.mark.parametrize(("taker", "settings", "options"), TAKERS)
def test_types_signature_and_documentation_follow_the_declaration(taker: type, settings: type, options: type) -> None:
    declared = {each.name: each for each in fields(settings)}
    assert get_type_hints(options) == {k: v for k, v in get_type_hints(settings).items() if k in declared}
    parameters = inspect.signature(taker).parameters
    for name, each in declared.items():
        assert parameters[name].default == each.default and parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"\n    {name}: {each.metadata['doc'].split()[0]}" in inspect.getdoc(taker)  # type: ignore[operator]
        assert f"\n    {name}: {each.metadata['doc'].split()[0]}" in inspect.getdoc(settings)  # type: ignore[operator]
    assert set(parameters) - set(declared) <= {"model", "guide", "settings", "progress", "callbacks"}


def test_every_option_belongs_to_a_group() -> None:
    assert set(grouped(Settings)) == {"schedule", "objective", "start", "run"}
    names = [{each.name for each in fields(settings)} for settings in (ElboSettings, Settings)]
    assert names[1] - names[0] == {"lr", "max_steps", "restarts"} and names[0] < names[1]


@pytest.mark.parametrize("taker", [AVBSVI, AVB_ELBO])
def test_a_misspelt_option_is_a_type_error_that_names_the_near_one(taker: Any) -> None:
    args = (models.normal_normal, ImplicitGuide(models.normal_normal)) if taker is AVBSVI else ()
    with pytest.raises(TypeError, match=f"{taker.__name__}.*'num_step'.*Did you mean 'num_steps'"):
        taker(*args, num_step=3)


def test_settings_as_a_value_give_the_fit_of_the_keywords() -> None:
    """Keywords replace fields of the settings; the settings themselves do not change."""
    settings = Settings(num_steps=4, num_particles=16, warm_start=5, seed=1)
    fits = [
        AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), progress=False, **options).run(torch.ones(3))
        for options in (
            {"settings": settings, "num_steps": 3},
            {"num_steps": 3, "num_particles": 16, "warm_start": 5, "seed": 1},
        )
    ]
    assert settings.num_steps == 4 and fits[0].num_steps == 3
    assert (fits[0].losses == fits[1].losses).all()
    with pytest.raises(FrozenInstanceError):
        settings.num_steps = 5  # type: ignore[misc]
    with pytest.raises(OptionError, match="settings must be a Settings"):
        AVBSVI(models.normal_normal, ImplicitGuide(models.normal_normal), settings=ElboSettings())  # type: ignore[arg-type]
