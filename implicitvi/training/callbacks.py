"""What may watch a fit: any callable that takes the trainer after each step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from implicitvi.errors import OptionError, SetupError, check_at_least, check_whole
from implicitvi.rng import RandomStream
from implicitvi.training.checkpoint import STATE, as_folder, read_state

T = TypeVar("T")

if TYPE_CHECKING:
    from implicitvi.training.trainer import Trainer


class StopTraining(Exception):
    """Raised by a callback to end the fit; its message becomes the stop reason."""


class Callback(Protocol):
    """Called after every step; may read everything, should change nothing, may raise `StopTraining`."""

    def __call__(self, trainer: Trainer) -> None:
        """Look at ``trainer.step_count``, ``trainer.history`` and ``trainer.players``."""


class Progress:
    """A tqdm bar with the last losses, refreshed twenty times a fit.

    Args:
        total: Number of steps to come.
        labels: Metric names shown, with their captions.
    """

    def __init__(self, total: int, labels: dict[str, str]):
        from tqdm.auto import tqdm

        self.labels = labels
        self.every = max(1, total // 20)
        # a log file gets a line now and then, a terminal or a notebook a smooth bar
        in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
        quiet = not (in_notebook or getattr(sys.stderr, "isatty", lambda: False)())
        self.bar: Any = tqdm(total=total, mininterval=10.0 if quiet else 0.1, unit="step")

    def __call__(self, trainer: Trainer) -> None:
        self.bar.update()
        if trainer.step_count % self.every == 0:
            shown = {
                caption: f"{trainer.history.last(metric, self.every):.3f}" for metric, caption in self.labels.items()
            }
            self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


class Tracker:
    """Records what a function says of the fit every so many steps, and changes nothing.

    The function draws from random numbers of its own, which depend on the step alone.

    Args:
        function: Of the trainer; a tensor that it returns is copied. The guide and the model come in by closure.
        every: Steps between two records.

    Attributes:
        steps: Steps after which there is a record, counted from 1.
        values: The records.

    Example:
        >>> from implicitvi import ImplicitGuide
        >>> guide = ImplicitGuide(lambda: None)
        >>> tracker = Tracker(lambda trainer: guide.sample(100)["mu"].mean(), every=50)
        >>> tracker.steps, tracker.values
        ([], [])
    """

    def __init__(self, function: Callable[[Trainer], Any], *, every: int = 100):
        _check_function("function", function)
        check_whole("every", every)
        self.function = function
        self.every = every
        self.steps: list[int] = []
        self.values: list[Any] = []

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        value = _ask(self.function, trainer)
        self.steps.append(trainer.step_count)
        self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)


class EarlyStop:
    """Ends a fit whose diagnostic no longer falls: the last looks are compared with those before them.

        stop if  mean(before) - mean(recent) < num_se * sqrt(var(before) / window + var(recent) / window)

    The loss is no diagnostic: while the adversary lags it is no bound, and a collapsed fit shows a low one. A fit that
    stops early has not been through the cool end of its schedule; ``start`` keeps it from stopping too soon.

    Args:
        diagnostic: Of the trainer, a number, lower is better: how far the guide's draws are from the posterior, or how
            badly they predict. It draws from random numbers of its own. Values that are not finite are left out.
        every: Steps between two looks.
        window: Looks in each of the two horizons, at least 2. No fit is ended before twice as many.
        num_se: By how many standard errors of the difference the recent looks have to be lower. Above 0 a slow fall in
            noise is given up sooner: where it is as much in a window as the noise's standard deviation, 16 % of fits
            end in the first half of the fall with 0, 80 % with 1 (windows of 10, 200 seeds).
        start: Steps before the first look.

    Attributes:
        steps: Steps after which there was a look.
        values: What the diagnostic was.
    """

    def __init__(
        self,
        diagnostic: Callable[[Trainer], float],
        *,
        every: int = 50,
        window: int = 10,
        num_se: float = 0.0,
        start: int = 0,
    ):
        if isinstance(diagnostic, str):
            raise OptionError(
                "a fit is not stopped by a metric of its own training",
                got=repr(diagnostic),
                expected="a function of the trainer that looks at the draws",
                do="The loss is no bound while the adversary lags; compare draws, as implicitvi.metrics does.",
            )
        _check_function("diagnostic", diagnostic)
        check_whole("every", every)
        check_whole("start", start, least=0)
        check_whole("window", window, least=2)
        check_at_least("num_se", num_se, 0)
        self.diagnostic = diagnostic
        self.every, self.window, self.num_se, self.start = every, window, num_se, start
        self.steps: list[int] = []
        self.values: list[float] = []

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count < self.start or trainer.step_count % self.every:
            return
        value = float(_ask(self.diagnostic, trainer))
        if not isfinite(value):
            return
        self.steps.append(trainer.step_count)
        self.values.append(value)
        if len(self.values) < 2 * self.window:
            return
        before = self.values[-2 * self.window : -self.window]
        recent = self.values[-self.window :]
        mean, earlier = float(np.mean(recent)), float(np.mean(before))
        gain = earlier - mean
        error = sqrt((np.var(before, ddof=1) + np.var(recent, ddof=1)) / self.window)
        if gain <= 0 or gain < self.num_se * error:
            raise StopTraining(
                f"the diagnostic no longer falls: {mean:.4g} over the last {self.window} looks, "
                f"{earlier:.4g} before, standard error {error:.2g}"
            )


class Checkpoint:
    """Keeps the last state of a fit in a folder and, by a diagnostic, the best one in its subfolder ``best``.

    Both are whole at any time and are read by `AVBSVI.load`. The best is found again when a fit is resumed.

    Args:
        folder: Where; made where there is none.
        every: Steps between two states that are kept.
        best: Diagnostic of the trainer, lower is better; ``None`` to keep the last state alone. Not the loss: see
            `EarlyStop`. It draws from random numbers of its own.

    Attributes:
        lowest: The diagnostic of the best state so far.
    """

    def __init__(self, folder: str | Path, *, every: int = 100, best: Callable[[Trainer], float] | None = None):
        if best is not None:
            _check_function("best", best)
        check_whole("every", every)
        self.folder = as_folder(folder)
        self.every = every
        self.best = best
        self.lowest = inf
        self._looked = False

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        trainer.save(self.folder)
        if self.best is None:
            return
        if not self._looked:
            self.lowest, self._looked = self._lowest_so_far(trainer), True
        score = float(_ask(self.best, trainer))
        if score < self.lowest:
            self.lowest = score
            began = _beginning(trainer)
            trainer.save(self.folder / "best", score=score, step=trainer.step_count, began=began)

    def _lowest_so_far(self, trainer: Trainer) -> float:
        """The score of the state in ``best``, if that is of this fit and not of an earlier one in the same folder."""
        folder = self.folder / "best"
        if not (folder / STATE).exists():
            return inf
        notes = read_state(folder)[0]["notes"]
        return float(notes["score"]) if notes.get("began") == _beginning(trainer) else inf


class TensorBoard:
    """Shows the metrics of a fit in TensorBoard: their means since the last look.

    Needs ``pip install implicitvi[tensorboard]``.

    Args:
        folder: Where TensorBoard looks, as ``tensorboard --logdir folder``.
        every: Steps between two looks.

    Raises:
        SetupError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path, *, every: int = 20):
        check_whole("every", every)
        as_folder(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SetupError(
                "TensorBoard is not installed",
                got=str(error),
                do="Run pip install 'implicitvi[tensorboard]', or record with Tracker.",
            ) from error
        self.every = every
        self.writer: Any = SummaryWriter(str(folder))

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        for name in trainer.history.names():
            value = trainer.history.last(name, self.every)
            self.writer.add_scalar(name, value, trainer.step_count)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def _beginning(trainer: Trainer) -> list[float]:
    """The losses of the first step, by which a fit is known again."""
    return [float(trainer.history[player.name][0]) for player in trainer.players]


def _ask(function: Callable[[Trainer], T], trainer: Trainer) -> T:
    """What a user's function says, without a trace in anybody's random numbers."""
    with RandomStream(trainer.step_count):
        return function(trainer)


def as_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """The functions of an option ``callbacks``; raise `OptionError` where they are none."""
    if not isinstance(callbacks, Iterable):
        raise OptionError(
            "callbacks is not a list",
            got=repr(callbacks),
            expected="functions of the trainer",
            do="Put a single one into a list, callbacks=[callback].",
        )
    found = tuple(callbacks)
    for callback in found:
        _check_function("one of the callbacks", callback)
    return found


def _check_function(option: str, value: object) -> None:
    if not callable(value):
        raise OptionError(f"{option} cannot be called", got=repr(value), expected="a function of the trainer")
