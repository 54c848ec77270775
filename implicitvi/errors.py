"""Errors that this library raises: each says what must be, what it got, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from math import inf, nextafter
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


class FitWarning(UserWarning):
    """A fit has ended, but some of its draws are not those of the posterior."""


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``choices``; suggest the nearest one."""
    names = sorted(choices)
    if not isinstance(value, str) or value not in names:
        raise OptionError.must_be(
            option, f"one of {', '.join(map(repr, names))}", repr(value), did_you_mean(value, names)
        )


def check_flag(option: str, value: Any) -> bool:
    """Return True or False of any kind as Python's own; raise `OptionError` for any other value."""
    flag = plain_number(value)
    if not isinstance(flag, bool):
        raise OptionError.must_be(option, "True or False", repr(value))
    return flag


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question for the name that is nearest to an unknown one; an empty string where none is near."""
    near = get_close_matches(str(name), list(names), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def plain_number(value: Any) -> Any:
    """Return a number of numpy or a tensor without axes as Python's own, also in a pair; anything else unchanged.

    >>> import torch
    >>> plain_number((torch.tensor(3), 0.5))
    (3, 0.5)
    """
    if type(value) in (tuple, list):
        return type(value)(map(plain_number, value))
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def check_number(option: str, value: Any, expected: str, least: float = -inf, most: float = inf) -> float:
    """Return a number of any kind as Python's own; raise `OptionError` unless it is finite and from least to most."""
    number: int | float = plain_number(value)
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < inf
    if not is_number or not least <= number <= most:
        raise OptionError.must_be(option, expected, repr(value))
    return number


def check_at_least(option: str, value: Any, least: float) -> float:
    """Return a number of any kind as Python's own; raise `OptionError` unless it is finite and ``value >= least``."""
    return check_number(option, value, f"a number >= {least}", least)


def check_positive(option: str, value: Any) -> float:
    """Return a number of any kind as Python's own; raise `OptionError` unless it is finite and ``value > 0``."""
    return check_number(option, value, "a finite number > 0", nextafter(0.0, 1.0))


def check_whole(option: str, value: Any, least: int = 1, most: float = inf) -> int:
    """Return a whole number of any kind as Python's own; raise `OptionError` unless it is from least to most."""
    number = plain_number(value)
    if type(number) is not int or not least <= number <= most:
        expected = f"an int >= {least}" + (f" and <= {most}" if type(number) is int and number > most else "")
        raise OptionError.must_be(option, expected, repr(value))
    return number


def check_size(option: str, value: Any) -> int:
    """Return a number of entries as Python's own int; raise `OptionError` unless a tensor can have so many."""
    return check_whole(option, value, 1, 2**31 - 1)


def check_sizes(option: str, values: Any) -> tuple[int, ...]:
    """Return a sequence of numbers of entries, such as a shape; raise `OptionError` unless a tensor can have them."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise OptionError.must_be(option, "a sequence of whole numbers, such as (300, 300)", repr(values))
    return tuple(check_size(option, value) for value in values)


def check_seed(option: str, value: Any) -> int:
    """Return a seed as Python's own int; raise `OptionError` unless torch takes it."""
    return check_whole(option, value, 0, 2**64 - 1)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def as_float(what: str, value: Any) -> float:
    """Return a number that a user's function has returned; raise `OptionError` unless it is one."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        advice = "Return a float, or a tensor of one entry."
        raise OptionError.must_be(what, "a number", repr(value), advice) from error


def check_function(option: str, value: object, expected: str) -> None:
    """Raise `OptionError` unless a value can be called."""
    if not callable(value):
        raise OptionError.must_be(option, expected, repr(value))
