"""Options that are declared once: in signatures, documentation, checks and errors."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from implicitvi.errors import OptionError, check_choice, check_positive, check_whole
from implicitvi.training.options import (
    check_options,
    documented,
    from_options,
    grouped,
    option,
    optional,
    values_of,
    with_options,
)


@documented
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a fit."""

    num_steps: int = option(10, "Number of steps.", group="schedule", check=check_whole)
    lr: float | None = option(None, "Rate " + "of Adam " * 20, group="schedule", check=optional(check_positive))
    mode: str = option("fast", "The mode.", check=partial(check_choice, choices=("fast", "slow")), decisive=False)

    def __post_init__(self) -> None:
        check_options(self)


@with_options(Settings)
def fit(x: int, *, scale: float = 1.0, settings: Settings | None = None, **options: Any) -> Settings:
    """Fit a model.

    Args:
        x: Data.
        scale: Their scale.
        settings: Options as a value.

    Returns:
        The settings.
    """
    return from_options(Settings, options, settings, of=fit)


@with_options(Settings)
class Fitter:
    """A fitter.

    Args:
        x: Data.
    """

    def __init__(self, x: int, **options: Any):
        self.settings = from_options(Settings, options, of=type(self))


def test_signatures_list_the_options_with_their_defaults() -> None:
    shown = [("num_steps", 10), ("lr", None), ("mode", "fast")]
    for function, own in ((fit, ["x", "scale", "settings"]), (Fitter, ["x"])):
        parameters = inspect.signature(function).parameters
        assert [*parameters] == own + [name for name, _ in shown]
        assert [(name, parameters[name].default) for name, _ in shown] == shown
    assert inspect.signature(fit).parameters["lr"].annotation == "float | None"


@pytest.mark.parametrize("target", [fit, Fitter, Settings])
def test_docstrings_list_the_options_in_their_section(target: Any) -> None:
    text = inspect.getdoc(target)
    assert text is not None
    section = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    assert "    num_steps: Number of steps.\n    lr: Rate of Adam" in section
    assert section.rstrip().endswith("    mode: The mode.")
    assert max(map(len, section.splitlines())) <= 100
    assert target is not fit or "\n\nReturns:\n    The settings." in text


def test_options_and_settings_give_the_same() -> None:
    assert fit(1, num_steps=3) == fit(1, settings=Settings(num_steps=3)) == Fitter(1, num_steps=3).settings
    assert fit(1, settings=Settings(num_steps=3, lr=0.1), lr=0.2) == Settings(num_steps=3, lr=0.2)
    with pytest.raises(OptionError, match="settings must be a Settings, got 3"):
        fit(1, settings=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_step": 3}, r"^fit\(\) got an unexpected keyword argument 'num_step'. Did you mean 'num_steps'\?$"),
        ({"scal": 3}, r"Did you mean 'scale'\?$"),
        ({"zzz": 3}, r"argument 'zzz'.$"),
    ],
)
def test_unknown_options_are_type_errors(given: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fit(1, **given)
    with pytest.raises(TypeError, match=r"^Fitter\(\) got an unexpected"):
        Fitter(1, **given)


@pytest.mark.parametrize("given", [{"num_steps": 0}, {"lr": -1.0}, {"mode": "fas"}])
def test_values_that_cannot_work_are_refused_and_named(given: dict[str, Any]) -> None:
    for make in (fit, Fitter):
        with pytest.raises(OptionError, match=f"^{next(iter(given))} must be "):
            make(1, **given)


def test_values_and_groups_are_those_of_the_declaration() -> None:
    assert values_of(Settings(lr=0.1)) == {"num_steps": 10, "lr": 0.1, "mode": "fast"}
    assert values_of(Settings(), decisive=True) == {"num_steps": 10, "lr": None}
    assert grouped(Settings) == {"schedule": ["num_steps", "lr"], "": ["mode"]}
