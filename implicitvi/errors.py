"""What this library raises: each error names what was wrong, what it got, what it expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

FAQ = "docs/howto/faq.md"
SHAPES = "\nTrace Shapes:"  # what Pyro adds to an error that a model or guide raises


class ImplicitVIError(Exception):
    """Base of every error that implicitvi raises on purpose.

    Args:
        what: What was wrong, one sentence without the full stop.
        got: What was given; left out of the message when ``None``.
        expected: What would have been right; left out when ``None``.
        do: What the reader can do about it.
        faq: Heading in the FAQ that says more, as links write it; shown on a line of its own. ``None`` for that of the
            class, which most have not.

    Attributes:
        faq: The heading, or nothing.

    >>> print(ImplicitVIError("the plate is empty", got=0, expected="at least 1", do="Pass data."))
    the plate is empty; got 0, expected at least 1. Pass data.
    >>> print(CheckpointError("the checkpoint cannot be read", do="Take an older copy."))
    the checkpoint cannot be read. Take an older copy.
    More: docs/howto/faq.md#a-checkpoint-is-refused
    """

    faq = ""

    def __init__(
        self, what: str, *, got: object = None, expected: object = None, do: str = "", faq: str | None = None
    ) -> None:
        if SHAPES in what:  # made again by Pyro, of a whole message and a table that tells less
            super().__init__(what.partition(SHAPES)[0])
            return
        parts = [f"got {got}"] if got is not None else []
        parts += [f"expected {expected}"] if expected is not None else []
        detail = "; " + ", ".join(parts) if parts else ""
        self.faq = self.faq if faq is None else faq
        more = f"\nMore: {FAQ}#{self.faq}" if self.faq else ""
        super().__init__(f"{what}{detail}.{' ' + do if do else ''}{more}")


class OptionError(ImplicitVIError, ValueError):
    """An option has a value that cannot work."""


class ShapeError(ImplicitVIError, ValueError):
    """A tensor does not have the shape that its role asks for."""


class ModelError(ImplicitVIError, ValueError):
    """The Pyro model cannot be fitted by this guide, found out before the first step."""


class SetupError(ImplicitVIError, RuntimeError):
    """Something was asked of a guide or fit that has not seen the model's arguments yet."""


class DataError(ImplicitVIError, ValueError):
    """Files of data are missing, damaged or of another kind."""


class CheckpointError(ImplicitVIError, ValueError):
    """A checkpoint cannot be read, or belongs to something else."""

    faq = "a-checkpoint-is-refused"


class NonFiniteError(ImplicitVIError, FloatingPointError):
    """Training met too many non-finite steps; the last good state has been restored.

    Attributes:
        player: Name of the player whose loss or gradient was not finite.
        step: The step at which training gave up.
    """

    faq = "turns-are-skipped-or-draws-dropped"

    def __init__(self, what: str, *, player: str, step: int, do: str = "") -> None:
        super().__init__(what, do=do)
        self.player = player
        self.step = step


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``choices``; suggests the nearest one."""
    names = sorted(choices)
    if value not in names:
        raise OptionError(
            f"{option} is not known",
            got=repr(value),
            expected=f"one of {', '.join(map(repr, names))}",
            do=did_you_mean(value, names),
        )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question for the name that is nearest to an unknown one; empty where none is near."""
    near = get_close_matches(str(name), list(names), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def check_at_least(option: str, value: float, least: float) -> None:
    """Raise `OptionError` unless ``value`` is a number and ``value >= least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
        raise OptionError(f"{option} is out of range", got=repr(value), expected=f">= {least}")


def check_whole(option: str, value: float, least: int = 1) -> None:
    """Raise `OptionError` unless ``value`` is a whole number and ``value >= least``."""
    check_at_least(option, value, least)
    if not isinstance(value, int):
        raise OptionError(f"{option} is not a whole number", got=repr(value), expected=f"an int >= {least}")


def check_positive(option: str, value: float) -> None:
    """Raise `OptionError` unless ``value`` is a number and ``value > 0``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(f"{option} is out of range", got=repr(value), expected="> 0")
