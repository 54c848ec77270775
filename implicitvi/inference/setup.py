"""What stands behind both doors, `AVBSVI` and `AVB_ELBO`: from options and a model's arguments to a trainer."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

from implicitvi.errors import SetupError, check_at_least, check_positive, check_whole
from implicitvi.inference.amortized_objective import AmortizedProblem
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.objective import Arguments, Problem
from implicitvi.inference.settings import ProblemOptions, check_devices, check_guide
from implicitvi.numerics.types import Model
from implicitvi.rng import RandomStream, derived_seed
from implicitvi.training import Schedule, Trainer


class Engine:
    """The objective and the trainer of one guide, made when the model's arguments are first seen.

    Args:
        schedule: Settings of every step.
        options: What the objective is made of.
        moves_sampler: Whether the sampler is one of the trainer's players; else somebody else moves it.
        clip_norm: Bound of the global norm of each player's gradient; ``None`` for one by what is usual.
        max_skips: Non-finite turns in a row that end the fit.
        seed: Seed of the fit's own random numbers; ``None`` takes one from torch's default generator.

    Attributes:
        arguments: The model's arguments of the present call.
    """

    def __init__(
        self,
        schedule: Schedule,
        options: ProblemOptions,
        *,
        moves_sampler: bool,
        clip_norm: float | None,
        max_skips: int,
        seed: int | None,
    ):
        if clip_norm is not None:
            check_positive("clip_norm", clip_norm)
        check_whole("max_skips", max_skips)
        ends = [schedule.at(step) for step in (0, schedule.num_steps)]
        check_at_least("num_particles", min(stage.num_particles for stage in ends), 2)
        check_at_least("adversary_steps", min(stage.adversary_steps for stage in ends), 1)
        self.schedule = schedule
        self.options = options
        self.stream = RandomStream(seed)
        self.seed = seed
        self.arguments = self._first = Arguments((), {})
        self._moves_sampler = moves_sampler
        self._clip_norm = clip_norm
        self._max_skips = max_skips
        self._made: tuple[Problem | AmortizedProblem, Trainer] | None = None

    @property
    def is_set_up(self) -> bool:
        """Whether the model's arguments have been seen."""
        return self._made is not None

    @property
    def problem(self) -> Problem | AmortizedProblem:
        """The objective and the log joint."""
        return self._require()[0]

    @property
    def trainer(self) -> Trainer:
        """The loop, with its players, step count and history."""
        return self._require()[1]

    def fresh_copy(self, key: int) -> Engine:
        """An engine of the same options, not set up, with random numbers of its own: the same ones for one key."""
        other = copy(self)
        other.seed = None if self.seed is None else derived_seed(self.seed, key)
        other.stream = RandomStream(other.seed)
        return other

    def setup(self, model: Model, guide: ImplicitGuide, arguments: Arguments) -> None:
        """Make everything that precedes the first step; the next time only take the arguments.

        Raises:
            ModelError: The model cannot be fitted by this guide.
        """
        self.arguments = arguments
        if self._made is not None:
            check_devices(arguments, self._first)
            return
        check_guide(guide)
        self._first = arguments
        with self.stream:
            problem = self.options.build(model, guide, arguments, num_steps=self.schedule.num_steps)
        now: Callable[[], Arguments] = lambda: self.arguments  # noqa: E731
        players = problem.opponents(now)
        if self._moves_sampler:
            players.append(problem.sampler_player(now))
        trainer = Trainer(
            players,
            schedule=self.schedule,
            stream=self.stream,
            clip_norm=self._clip_norm,
            max_skips=self._max_skips,
            explain=lambda: problem.explain(self.arguments),
        )
        self._made = problem, trainer

    def _require(self) -> tuple[Problem | AmortizedProblem, Trainer]:
        if self._made is None:
            raise SetupError(
                "the fit has not seen its model yet", do="Call run, step, or setup with the model's arguments first."
            )
        return self._made
