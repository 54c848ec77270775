"""Watch a fit: callbacks are functions that take the trainer after each step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from implicitvi.errors import OptionError, SetupError, check_at_least, check_whole
from implicitvi.rng import RandomStream
from implicitvi.training.checkpoint import STATE, as_folder, read_state
from implicitvi.training.trainer import Callback, StopTraining, Trainer

T = TypeVar("T")
Diagnostic = Callable[[Trainer], float]


class Progress:
    """A tqdm bar over ``total`` steps with the last values of metrics, ``labels`` to captions, set 20 times a fit."""

    def __init__(self, total: int, labels: dict[str, str]):
        from tqdm.auto import tqdm

        self.labels = labels
        self.every = max(1, total // 20)
        # a log file gets a line every ten seconds, a terminal or a notebook a smooth bar
        in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
        quiet = not (in_notebook or getattr(sys.stderr, "isatty", lambda: False)())
        self.bar: Any = tqdm(total=total, mininterval=10.0 if quiet else 0.1, unit="step")

    def __call__(self, trainer: Trainer) -> None:
        self.bar.update()
        if trainer.step_count % self.every == 0:
            last = {caption: trainer.history.last(metric, self.every) for metric, caption in self.labels.items()}
            self.bar.set_postfix({caption: f"{value:.3f}" for caption, value in last.items()}, refresh=False)

    def close(self) -> None:
        """Close the bar and leave it visible."""
        self.bar.close()


class Tracker:
    """A callback that records the value of a function of the fit at regular steps, and changes nothing.

    The function draws from its own random numbers, which depend on the step alone.

    Args:
        function: A function of the trainer, or a closure on the guide or the model; a tensor from it is copied.
        every: Steps between two records.

    Attributes:
        steps: Steps after which there is a record, counted from 1.
        values: The records.

    >>> from implicitvi import ImplicitGuide
    >>> guide = ImplicitGuide(lambda: None)
    >>> tracker = Tracker(lambda trainer: guide.sample(100)["mu"].mean(), every=50)
    >>> tracker.steps, tracker.values
    ([], [])
    """

    def __init__(self, function: Callable[[Trainer], Any], *, every: int = 100):
        _check_function("function", function)
        check_whole("every", every)
        self.function, self.every = function, every
        self.steps: list[int] = []
        self.values: list[Any] = []

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        value = _call(self.function, trainer)
        self.steps.append(trainer.step_count)
        self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)


class EarlyStop:
    """A callback that ends a fit when its diagnostic no longer falls; it compares the last values with earlier ones.

        stop if  mean(before) - mean(recent) < num_se * sqrt(var(before) / window + var(recent) / window)

    Do not use the loss: while the adversary lags it is not a bound, and a collapsed fit has a low one. A fit that stops
    early has not been through the cool end of its schedule; ``start`` keeps it from stopping too soon.

    Args:
        diagnostic: A function of the trainer that returns a number, lower is better, such as the distance of the
            guide's draws from the posterior. It has its own random numbers. Values that are not finite are left out.
        every: Steps between two evaluations.
        window: Evaluations in each of the two windows, at least 2. A fit ends only after twice as many.
        num_se: Standard errors of the difference by which recent values have to be lower. Above 0 a slow fall in noise
            is given up sooner: if a window's fall equals the noise's standard deviation, 16 % of fits end in the first
            half of the fall with 0, 80 % with 1 (windows of 10, 200 seeds).
        start: Steps before the first evaluation.

    Attributes:
        steps: Steps after which the diagnostic was evaluated.
        values: Values of the diagnostic.
    """

    def __init__(
        self, diagnostic: Diagnostic, *, every: int = 50, window: int = 10, num_se: float = 0.0, start: int = 0
    ):
        if isinstance(diagnostic, str):
            expected = "a function of the trainer, not a metric of training"
            do = "The loss is not a bound while the adversary lags; compare draws, as implicitvi.metrics does."
            raise OptionError.must_be("diagnostic", expected, repr(diagnostic), do)
        _check_function("diagnostic", diagnostic)
        for option, value, least in (("every", every, 1), ("start", start, 0), ("window", window, 2)):
            check_whole(option, value, least)
        check_at_least("num_se", num_se, 0)
        self.diagnostic = diagnostic
        self.every, self.window, self.num_se, self.start = every, window, num_se, start
        self.steps: list[int] = []
        self.values: list[float] = []

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count < self.start or trainer.step_count % self.every:
            return
        value = float(_call(self.diagnostic, trainer))
        if not isfinite(value):
            return
        self.steps.append(trainer.step_count)
        self.values.append(value)
        if len(self.values) < 2 * self.window:
            return
        before, recent = np.split(np.array(self.values[-2 * self.window :]), 2)
        gain = before.mean() - recent.mean()
        error = sqrt((before.var(ddof=1) + recent.var(ddof=1)) / self.window)
        if gain <= 0 or gain < self.num_se * error:
            raise StopTraining(
                f"the diagnostic no longer falls: {recent.mean():.4g} over the last {self.window} evaluations, "
                f"{before.mean():.4g} before, standard error {error:.2g}"
            )


class Checkpoint:
    """A callback that keeps the last state of a fit in a folder and, by a diagnostic, the best one in ``best`` inside.

    Both are complete at any time and are read by `AVBSVI.load`. A resumed fit continues from the best score so far.

    Args:
        folder: The folder, created if it does not exist.
        every: Steps between two saved states.
        best: Diagnostic of the trainer as in `EarlyStop`, lower is better; ``None`` to keep the last state alone.

    Attributes:
        lowest: The diagnostic of the best state so far.
    """

    def __init__(self, folder: str | Path, *, every: int = 100, best: Diagnostic | None = None):
        if best is not None:
            _check_function("best", best)
        check_whole("every", every)
        self.folder, self.every, self.best = as_folder(folder), every, best
        self.lowest, self._started = inf, False

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        trainer.save(self.folder)
        if self.best is None:
            return
        if not self._started:
            self.lowest, self._started = self._lowest_so_far(trainer), True
        score = float(_call(self.best, trainer))
        if score < self.lowest:
            self.lowest = score
            trainer.save(self.folder / "best", score=score, step=trainer.step_count, began=_first_losses(trainer))

    def _lowest_so_far(self, trainer: Trainer) -> float:
        """Return the score of the state in ``best`` if it is of this fit, not of an earlier one in the same folder."""
        folder = self.folder / "best"
        if not (folder / STATE).exists():
            return inf
        notes = read_state(folder)[0]["notes"]
        return float(notes["score"]) if notes.get("began") == _first_losses(trainer) else inf


class TensorBoard:
    """A callback that shows the metrics of a fit in TensorBoard: their means since the last record.

    Needs ``pip install implicitvi[tensorboard]``.

    Args:
        folder: The folder that TensorBoard reads, as ``tensorboard --logdir folder``.
        every: Steps between two records.
    """

    def __init__(self, folder: str | Path, *, every: int = 20):
        check_whole("every", every)
        as_folder(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            do = "Run pip install 'implicitvi[tensorboard]', or use Tracker."
            raise SetupError(f"TensorBoard is not installed ({error}). {do}") from error
        self.every = every
        self.writer: Any = SummaryWriter(str(folder))

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        for name in trainer.history.names():
            self.writer.add_scalar(name, trainer.history.last(name, self.every), trainer.step_count)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def as_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """Return the functions of an option ``callbacks``; raise `OptionError` unless all can be called."""
    if not isinstance(callbacks, Iterable):
        do = "Put a single one into a list, callbacks=[callback]."
        raise OptionError.must_be("callbacks", "a list of functions", repr(callbacks), do)
    found = tuple(callbacks)
    for callback in found:
        _check_function("each of the callbacks", callback)
    return found


def _first_losses(trainer: Trainer) -> list[float]:
    """Return the losses of the first step, which identify a fit."""
    return [float(trainer.history[player.name][0]) for player in trainer.players]


def _call(function: Callable[[Trainer], T], trainer: Trainer) -> T:
    """Call a user's function without disturbing any other random numbers."""
    with RandomStream(trainer.step_count):
        return function(trainer)


def _check_function(option: str, value: object) -> None:
    if not callable(value):
        raise OptionError.must_be(option, "a function of the trainer", repr(value))
