"""Declare the options of a fit: defaults, checks and documentation in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import nextafter
from typing import Any, TypedDict

from torch import nn

from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.avb.contrasts import Contrast
from implicitvi.avb.ratios import RATIOS, RatioLoss
from implicitvi.errors import (
    OptionError,
    check_choice,
    check_flag,
    check_function,
    check_number,
    check_positive,
    check_seed,
    check_whole,
)
from implicitvi.pyro_model.compiled import check_compile
from implicitvi.pyro_model.log_joint import MODES
from implicitvi.training import Schedule
from implicitvi.training.options import check_options, documented, option, optional

MOST_RESTARTS = 1000  # each is a guide
TEMPERING = "a share of the log joint above 0, or None"
CONTRASTS = ("mixture", "gaussian", "diagonal", "flow", "moments", "prior")
Pair = tuple[int, int]
Rate = float | tuple[float, float]


def _at_least(least: int) -> Callable[[str, Any], object]:
    return lambda name, value: check_whole(name, value, least)


def _contrast(name: str, value: Any) -> None:
    if isinstance(value, str):
        check_choice(name, value, CONTRASTS)
    else:
        check_function(name, value, "the name of a contrast, or a function of the latent dimension that returns one")


def _ratio(name: str, value: Any) -> None:
    if isinstance(value, str):
        check_choice(name, value, RATIOS)
    elif isinstance(value, type) or not all(callable(getattr(value, part, None)) for part in ("loss", "log_ratio")):
        expected = f"one of {', '.join(map(repr, RATIOS))}, or a RatioLoss with the methods loss and log_ratio"
        raise OptionError.must_be(name, expected, repr(value))


def _share(name: str, value: Any) -> None:
    check_number(name, value, "at least 0 and below 1", 0.0, nextafter(1.0, 0.0))


@documented
@dataclass(frozen=True, kw_only=True)
class ElboSettings:
    """The options of `AVB_ELBO`, and of `AVBSVI` without its own. `Schedule` says what the numbers of a pair mean.

    Raises:
        OptionError: An option has a value that cannot work.
    """

    num_steps: int | None = option(
        Schedule.num_steps,
        "Steps of the sampler in a run, and the horizon of every schedule. ``None`` for rounds, each a whole schedule "
        "and twice as long as the last: `AVBSVI.run` ends when a judgement of fresh draws finds nothing wrong. "
        "Amortized guides, and models with parameters, minibatches or a log density that is scored in a loop, cannot "
        "be judged; for them ``None`` is 2,500 steps.",
        group="schedule",
        check=optional(check_whole),
    )
    num_particles: int | Pair = option(Schedule.num_particles, "Draws a step, at least 2.", group="schedule")
    adversary_steps: int | Pair = option(
        Schedule.adversary_steps, "Steps of the adversary before each of the sampler.", group="schedule"
    )
    adversary_lr: Rate = option(
        Schedule.adversary_lr, "Rate of the adversary and of a flow contrast.", group="schedule"
    )
    tempering: float | None = option(
        Schedule.tempering,
        "Share of the log joint at the first step, rising to 1 over a third of the steps: the fit starts from a wide "
        "Gaussian. ``None`` for none. It would mislead the parameters of a model, amortized guides, and modes that are "
        "known before the first step.",
        group="schedule",
        check=optional(lambda name, value: check_number(name, value, TEMPERING, nextafter(0.0, 1.0), 1.0)),
    )
    contrast: str | Callable[[int], Contrast] = option(
        "mixture",
        '``"mixture"`` (of Gaussians that follow the draws), ``"gaussian"`` (adaptive contrast, full covariance), '
        '``"diagonal"`` (as in the paper), ``"flow"``, ``"prior"`` (plain AVB, which needs no density of the prior), '
        "or a function of the latent dimension that returns a `Contrast`. For an amortized guide all but "
        '``"prior"`` are moved and scaled for each datum by its encoder, and ``"moments"`` has the closed-form moments '
        'of ``sampler="noise_basis"``.',
        group="objective",
        check=_contrast,
    )
    adversary: Callable[..., nn.Module] = option(
        GatedAdversary,
        "Function of the latent dimension, and of ``context_dim`` for an amortized guide, that returns the adversary.",
        group="objective",
        check=lambda name, value: check_function(name, value, "a function of the latent dimension"),
    )
    informed: bool = option(
        False,
        "Whether the adversary sees ``log p - log r`` beside the draws (`InformedAdversary`).",
        group="objective",
        check=check_flag,
    )
    ratio: str | RatioLoss = option(
        "logistic",
        '``"logistic"``, ``"fgan_kl"``, ``"least_squares"``, or a `RatioLoss`.',
        group="objective",
        check=_ratio,
    )
    averaging: float = option(
        0.9,
        "Share of a running average of the adversary's weights that each of its steps keeps; the sampler sees the "
        "average. 0 for the current weights.",
        group="objective",
        check=_share,
    )
    num_importance: int = option(
        1,
        "Draws in each importance-weighted bound (`importance_weighted`); 1 for the ELBO. More of them pay where the "
        "model has parameters or the guide is amortized, not for a posterior alone.",
        group="objective",
        check=check_whole,
    )
    mode: str = option(
        "auto",
        'Mode of scoring the model: ``"auto"``, ``"vmap"``, ``"plate"`` or ``"loop"`` (`LogJoint`).',
        group="objective",
        check=lambda name, value: check_choice(name, value, MODES),
        decisive=False,
    )
    compile: str | None = option(
        None,
        '``"graph"`` records the model\'s log joint once and runs it without Pyro; ``"inductor"`` compiles that to '
        "machine code, which takes some seconds before the first step and a C++ compiler. ``None`` for neither. "
        "Results agree to rounding; a model that cannot be recorded is scored as it is, with a warning. On a CUDA "
        'device ``"inductor"`` compiles the networks too.',
        group="objective",
        check=lambda _, value: check_compile(value),
        decisive=False,
    )
    warm_start: int = option(
        600,
        "Most steps of the Gaussian fit that gives the sampler its location and scale (`first_gaussian`): of Adam if "
        "the model has parameters, minibatches, more than 200 dimensions or an amortized guide; each path uphill takes "
        "at most 100. 0 for no such fit.",
        group="start",
        check=_at_least(0),
    )
    max_modes: int = option(
        8,
        "Most far modes to find after the warm start (`find_modes`); each gets a location and scale of its own "
        "(`MixtureSampler`). 1 for no search. There is no search without a warm start, where the model has parameters, "
        "is scored in a loop or sees minibatches, or where the contrast is the prior.",
        group="start",
        check=check_whole,
    )
    clip_norm: float | None = option(
        None,
        "Bound of the global norm of each player's gradient; ``None`` for four times the usual norm. A bound that cuts "
        "most gradients biases the fit: it cuts where the posterior pulls hardest.",
        group="run",
        check=optional(check_positive),
    )
    max_skips: int = option(
        20, "Non-finite turns in a row that end the fit.", group="run", check=check_whole, decisive=False
    )
    seed: int | None = option(
        None,
        "Seed of the fit's own random numbers; ``None`` takes one from torch's default generator, so that "
        "``pyro.set_rng_seed`` decides.",
        group="run",
        check=optional(check_seed),
    )

    def __post_init__(self) -> None:
        check_options(self)
        schedule = self.schedule
        whole = schedule.round_at(0)
        ends = [schedule.within(whole, step) for step in (0, whole.end)]
        check_whole("num_particles", min(stage.num_particles for stage in ends), 2)
        check_whole("adversary_steps", min(stage.adversary_steps for stage in ends))

    @property
    def schedule(self) -> Schedule:
        """The settings of every step."""
        return Schedule(
            num_steps=self.num_steps,
            num_particles=self.num_particles,
            adversary_steps=self.adversary_steps,
            adversary_lr=self.adversary_lr,
            tempering=self.tempering,
        )


@documented
@dataclass(frozen=True, kw_only=True)
class Settings(ElboSettings):
    """The options of `AVBSVI`, each declared once. `Schedule` says what the numbers of a pair mean.

    Raises:
        OptionError: An option has a value that cannot work.

    >>> Settings(num_steps=500).num_particles
    (448, 640)
    """

    lr: Rate = option(Schedule.lr, "Rate of the sampler.", group="schedule")
    max_steps: int = option(
        6300, "Steps after which no further round begins, with ``num_steps=None``.", group="schedule", check=check_whole
    )
    restarts: int = option(
        1,
        "Independent fits that `AVBSVI.run` makes, to see whether they agree (`Fit.agreement`). The guide is the first "
        "one's; the others have fresh copies of it and seeds that follow from ``seed``.",
        group="run",
        check=lambda name, value: check_whole(name, value, 1, MOST_RESTARTS),
        decisive=False,
    )

    @property
    def schedule(self) -> Schedule:
        """The settings of every step."""
        return replace(super().schedule, lr=self.lr)


class ElboOptions(TypedDict, total=False):
    """The names and types of `ElboSettings`, for editors and type checkers."""

    num_steps: int | None
    num_particles: int | Pair
    adversary_steps: int | Pair
    adversary_lr: Rate
    tempering: float | None
    contrast: str | Callable[[int], Contrast]
    adversary: Callable[..., nn.Module]
    informed: bool
    ratio: str | RatioLoss
    averaging: float
    num_importance: int
    mode: str
    compile: str | None
    warm_start: int
    max_modes: int
    clip_norm: float | None
    max_skips: int
    seed: int | None


class Options(ElboOptions, total=False):
    """The names and types of `Settings`, for editors and type checkers."""

    lr: Rate
    max_steps: int
    restarts: int
