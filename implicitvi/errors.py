"""Errors that this library raises: each says what must be, what it got, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, Self

SHAPES = "\nTrace Shapes:"  # what Pyro adds to an error that a model or guide raises


class ImplicitVIError(Exception):
    """A base class of every error that implicitvi raises on purpose.

    Args:
        message: Complete sentences: "X must be Y, got Z. Do W."
        faq: Anchor of the entry in the FAQ that says more, shown on a line of its own; ``None`` for that of the class.

    Attributes:
        faq: The anchor, or an empty string.

    >>> print(OptionError.must_be("num_steps", "an int >= 1", 0, do="Pass num_steps=100."))
    num_steps must be an int >= 1, got 0. Pass num_steps=100.
    >>> print(CheckpointError("The checkpoint cannot be read. Use an older copy."))
    The checkpoint cannot be read. Use an older copy.
    More: python -m implicitvi faq a-checkpoint-is-refused
    """

    faq = ""

    def __init__(self, message: str, *, faq: str | None = None):
        if SHAPES in message:  # Pyro raises the error again, with a table of shapes that says less
            super().__init__(message.partition(SHAPES)[0])
            return
        self.faq = self.faq if faq is None else faq
        super().__init__(f"{message}\nMore: python -m implicitvi faq {self.faq}" if self.faq else message)

    @classmethod
    def must_be(
        cls, what: str, expected: object, got: object = None, do: str = "", *, faq: str | None = None, **attributes: Any
    ) -> Self:
        """Return the error "``what`` must be ``expected``, got ``got``. ``do``"; a ``got`` of ``None`` is left out."""
        message = f"{what} must be {expected}" + ("." if got is None else f", got {got}.")
        return cls(f"{message} {do}" if do else message, faq=faq, **attributes)


class OptionError(ImplicitVIError, ValueError):
    """An option has a value that cannot work."""


class ShapeError(ImplicitVIError, ValueError):
    """A tensor does not have the shape that its role asks for."""


class ModelError(ImplicitVIError, ValueError):
    """The Pyro model cannot be fitted by this guide, as found before the first step."""


class SetupError(ImplicitVIError, RuntimeError):
    """A guide or fit is asked for something before it has seen the model's arguments."""


class DataError(ImplicitVIError, ValueError):
    """Files of data are missing, damaged or of another kind."""


class CheckpointError(ImplicitVIError, ValueError):
    """A checkpoint cannot be read, or belongs to another fit."""

    faq = "a-checkpoint-is-refused"


class NonFiniteError(ImplicitVIError, FloatingPointError):
    """Training met too many non-finite steps; the last good state has been restored.

    Attributes:
        player: Name of the player whose loss or gradient was not finite.
        step: The step at which training stopped.
    """

    faq = "turns-are-skipped-or-draws-dropped"

    def __init__(self, message: str, *, player: str, step: int):
        super().__init__(message)
        self.player = player
        self.step = step


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``choices``; suggest the nearest one."""
    names = sorted(choices)
    if value not in names:
        raise OptionError.must_be(
            option, f"one of {', '.join(map(repr, names))}", repr(value), did_you_mean(value, names)
        )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question for the name that is nearest to an unknown one; an empty string where none is near."""
    near = get_close_matches(str(name), list(names), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def check_at_least(option: str, value: float, least: float) -> None:
    """Raise `OptionError` unless ``value`` is a number and ``value >= least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise OptionError.must_be(option, f"a number >= {least}", repr(value))


def check_whole(option: str, value: float, least: int = 1) -> None:
    """Raise `OptionError` unless ``value`` is a whole number and ``value >= least``."""
    if isinstance(value, bool) or not isinstance(value, int) or not value >= least:
        raise OptionError.must_be(option, f"an int >= {least}", repr(value))


def check_positive(option: str, value: float) -> None:
    """Raise `OptionError` unless ``value`` is a number and ``value > 0``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError.must_be(option, "a number > 0", repr(value))
