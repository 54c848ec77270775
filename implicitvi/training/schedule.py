"""Define the settings that change in the course of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from implicitvi.errors import OptionError, check_positive, check_whole

HORIZON = 2500  # steps
FIRST_ROUND = 100  # steps
SETTLED = 0.7  # peak of the sampler's rate in a round, as a share of that in the round before


class Round(NamedTuple):
    """A round of a schedule: its number from 0, its first step, and its length in steps."""

    number: int
    first: int
    length: int

    @property
    def end(self) -> int:
        """Step after the last."""
        return self.first + self.length


@dataclass(frozen=True)
class Stage:
    """The settings of one step, named as in `Schedule`; ``beta`` is the factor of the log joint.

    The adversary gets ``num_particles`` draws of each class, and its steps precede the sampler's.
    """

    num_particles: int
    adversary_steps: int
    lr: float
    adversary_lr: float
    beta: float


@dataclass(frozen=True)
class Schedule:
    """A schedule that explores with small batches at high rates, then cools with larger ones.

    A pair means (while exploring, at the end): the first holds while exploring, then the batch grows and the rates
    fall geometrically to the second. A single number never changes.

    Args:
        num_steps: Steps of the sampler; ``None`` for rounds, each a whole schedule: the first of 100 steps, every other
            twice as long as the one before, from a lower peak of the sampler's rate.
        num_particles: Draws a step.
        adversary_steps: Steps of the adversary for each of the sampler.
        lr: Learning rate of the sampler (Adam).
        adversary_lr: Learning rate of the adversary and of a fitted contrast (Adam).
        tempering: Factor ``β`` of the log joint at the first step; ``None`` or 1 for the log joint throughout.
        tempered: Share of the steps over which ``β`` rises geometrically to 1.
        cool: Share of the steps that make up the cool end.
        warm_up: Share of the steps over which both rates rise from 0, linearly; 0 for none. Adam's first steps are as
            large as the rate in every weight at once, whatever the gradients.

    >>> schedule = Schedule(num_steps=100, lr=1e-3, num_particles=(256, 1024), tempering=None)
    >>> [schedule.at(step).num_particles for step in (0, 50, 100)]
    [256, 362, 1024]
    """

    num_steps: int | None = HORIZON
    num_particles: int | tuple[int, int] = (448, 640)
    adversary_steps: int | tuple[int, int] = 3
    lr: float | tuple[float, float] = (1e-3, 1e-5)
    adversary_lr: float | tuple[float, float] = (4e-3, 3e-4)
    tempering: float | None = None
    tempered: float = 1 / 3
    cool: float = 2 / 3
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            check_whole("num_steps", self.num_steps)
        for option, least in (("num_particles", 1), ("adversary_steps", 0)):
            for value in _pair(option, getattr(self, option)):
                check_whole(option, value, least)
        for option in ("lr", "adversary_lr"):
            for rate in _pair(option, getattr(self, option)):
                check_positive(option, rate)
        if isinstance(self.tempering, str):
            raise OptionError.must_be("tempering", "a share of the log joint, or None", repr(self.tempering))
        for option in ("tempered", "cool", "warm_up", "tempering"):
            share = getattr(self, option) or 0
            if not 0 <= share <= 1:
                raise OptionError.must_be(option, "between 0 and 1", share)

    def at(self, step: int) -> Stage:
        """Return the settings of step ``step``, counted from 0; beyond the horizon those of the last step."""
        return self.within(self.round_at(step), step)

    def round_at(self, step: int) -> Round:
        """Return the round of a step; with ``num_steps`` there is one."""
        if self.num_steps is not None:
            return Round(0, 0, self.num_steps)
        number = (step // FIRST_ROUND + 1).bit_length() - 1
        return Round(number, FIRST_ROUND * (2**number - 1), FIRST_ROUND * 2**number)

    def within(self, whole: Round, step: int) -> Stage:
        """Return the settings of a step of a round; at its end those of its cool end."""
        step -= whole.first
        done = min(step / whole.length, 1.0)
        cooled = max(0.0, (done - (1 - self.cool)) / self.cool) if self.cool else 0.0
        risen = min(1.0, (step + 1) / (self.warm_up * whole.length)) if self.warm_up else 1.0
        high, low = _pair("lr", self.lr)
        if high > low:
            high = max(low, high * SETTLED**whole.number)
        few, many = _pair("adversary_steps", self.adversary_steps)
        return Stage(
            num_particles=round(_geometric(*_pair("num_particles", self.num_particles), cooled)),
            adversary_steps=round(few + (many - few) * cooled),
            lr=risen * _geometric(high, low, cooled),
            adversary_lr=risen * _geometric(*_pair("adversary_lr", self.adversary_lr), cooled),
            beta=1.0 if whole.number else self._beta(done),
        )

    def _beta(self, done: float) -> float:
        if not self.tempering or not self.tempered or done >= self.tempered:
            return 1.0
        return min(1.0, _geometric(self.tempering, 1.0, done / self.tempered))


def _pair(option: str, value: float | tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise OptionError.must_be(option, "a number or a pair", value)
    return value[0], value[1]


def _geometric(start: float, end: float, done: float) -> float:
    return float(start * (end / start) ** done)
