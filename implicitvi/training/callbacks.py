"""Watch a fit: callbacks are functions that take the trainer after each step.

A callback has the records of one fit. Those of this module have a method ``for_restart``, which returns a callback of
the same kind with records of its own for another fit; a callback without that method is called by all fits of a run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from implicitvi.errors import OptionError, SetupError, as_float, check_at_least, check_whole
from implicitvi.rng import RandomStream
from implicitvi.training.checkpoint import STATE, as_folder, read_state
from implicitvi.training.trainer import Callback, StopTraining, Trainer

T = TypeVar("T")
Diagnostic = Callable[[Trainer], float]


class Progress:
    """A tqdm bar over ``total`` steps with the last values of metrics, ``labels`` to captions, set 20 times a fit.

    With ``total=0`` it stands for the set-up, until `begin`. Without a stream to write to there is no bar.
    """

    def __init__(self, total: int, labels: dict[str, str]):
        from tqdm.auto import tqdm

        self.labels = labels
        self.every = max(1, total // 20)
        self.bar: Any = None
        # a log file gets a line every ten seconds, a terminal or a notebook a smooth bar
        in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
        with suppress(OSError, ValueError, AttributeError):  # no stream, or a closed one
            quiet = not (in_notebook or getattr(sys.stderr, "isatty", lambda: False)())
            self.bar = tqdm(
                total=total, mininterval=10.0 if quiet else 0.1, unit="step", desc=None if total else "set-up"
            )

    def begin(self, total: int, title: str | None = None) -> None:
        """Go from the set-up, or another round, to ``total`` steps under a title."""
        self.every = max(1, total // 20)
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.set_description(title, refresh=False)
                self.bar.reset(total)

    def __call__(self, trainer: Trainer) -> None:
        if self.bar is None:
            return
        try:
            self.bar.update()
            if trainer.step_count % self.every == 0:
                last = {caption: trainer.history.last(metric, self.every) for metric, caption in self.labels.items()}
                self.bar.set_postfix({caption: f"{value:.3f}" for caption, value in last.items()}, refresh=False)
        except (OSError, ValueError):  # the stream was closed in the middle
            self.bar.disable, self.bar = True, None

    def close(self) -> None:
        """Close the bar and leave it visible."""
        if self.bar is not None:
            with suppress(OSError, ValueError):
                self.bar.close()


class Tracker:
    """A callback that records the value of a function of the fit at regular steps, and changes nothing.

    The function draws from its own random numbers, which depend on the step alone.

    Args:
        function: A function of the trainer, as of ``trainer.guide``; a tensor from it is copied.
        every: Steps between two records.

    Attributes:
        steps: Steps after which there is a record, counted from 1.
        values: The records.

    >>> tracker = Tracker(lambda trainer: trainer.guide.sample(100)["mu"].mean(), every=50)
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
        _forget_from(trainer.step_count, self.steps, self.values)
        self.steps.append(trainer.step_count)
        self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)

    def for_restart(self, name: str, others: object) -> Tracker:
        """Return a tracker with records of its own; ``others`` is the guide from which it must not draw."""
        _check_guide(self.function, others)
        return Tracker(self.function, every=self.every)


class EarlyStop:
    """A callback that ends a fit when its diagnostic no longer falls; it compares the last values with earlier ones.

        stop if  mean(before) - mean(recent) < num_se * sqrt(var(before) / window + var(recent) / window)

    Do not use the loss: while the adversary lags it is not a bound, and a collapsed fit has a low one. A fit that stops
    early has not been through the cool end of its schedule; ``start`` keeps it from stopping too soon.

    Args:
        diagnostic: A function of the trainer that returns a number, lower is better, such as the distance of the draws
            of ``trainer.guide`` from the posterior. It has its own random numbers. Values that are not finite are left
            out.
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
        self._stopped = 0  # step at which it ended a run; the next run is judged by later values

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count < self.start or trainer.step_count % self.every:
            return
        value = _number("diagnostic", self.diagnostic, trainer)
        _forget_from(trainer.step_count, self.steps, self.values)
        if not isfinite(value):
            return
        self.steps.append(trainer.step_count)
        self.values.append(value)
        if self._stopped >= trainer.step_count:
            self._stopped = 0
        if sum(step > self._stopped for step in self.steps) < 2 * self.window:
            return
        before, recent = np.split(np.array(self.values[-2 * self.window :]), 2)
        gain = before.mean() - recent.mean()
        error = sqrt((before.var(ddof=1) + recent.var(ddof=1)) / self.window)
        if gain <= 0 or gain < self.num_se * error:
            self._stopped = trainer.step_count
            raise StopTraining(
                f"the diagnostic no longer falls: {recent.mean():.4g} over the last {self.window} evaluations, "
                f"{before.mean():.4g} before, standard error {error:.2g}"
            )

    def for_restart(self, name: str, others: object) -> EarlyStop:
        """Return a callback with records of its own; ``others`` is the guide from which it must not draw."""
        _check_guide(self.diagnostic, others)
        every, window, num_se, start = self.every, self.window, self.num_se, self.start
        return EarlyStop(self.diagnostic, every=every, window=window, num_se=num_se, start=start)


class Checkpoint:
    """A callback that keeps the last state of a fit in a folder and, by a diagnostic, the best one in ``best`` inside.

    Both are complete at any time and are read by `AVBSVI.load`. A resumed fit continues from the best score so far.

    Args:
        folder: The folder, created if it does not exist; each restart has a folder of its own inside.
        every: Steps between two saved states.
        best: Diagnostic of the trainer as in `EarlyStop`, lower is better; ``None`` to keep the last state alone.

    Attributes:
        lowest: The diagnostic of the best state so far.
    """

    def __init__(self, folder: str | Path, *, every: int = 100, best: Diagnostic | None = None):
        if best is not None:
            _check_function("best", best)
        check_whole("every", every)
        self.folder, self.every, self.best = as_folder(folder, writable=True), every, best
        self.lowest, self._fit = inf, ""

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        trainer.save(self.folder)
        if self.best is None:
            return
        if self._fit != (fit := str(_first_losses(trainer))):
            self.lowest, self._fit = self._lowest_so_far(trainer), fit
        score = _number("best", self.best, trainer)
        if score < self.lowest:
            self.lowest = score
            trainer.save(self.folder / "best", score=score, step=trainer.step_count, began=_first_losses(trainer))

    def for_restart(self, name: str, others: object) -> Checkpoint:
        """Return a callback for the folder ``name`` inside; ``others`` is the guide from which it must not draw."""
        if self.best is not None:
            _check_guide(self.best, others)
        return Checkpoint(self.folder / name, every=self.every, best=self.best)

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
        folder: The folder that TensorBoard reads, as ``tensorboard --logdir folder``; each restart has one inside.
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
        self.folder, self.every = as_folder(folder, writable=True), every
        self.writer: Any = SummaryWriter(str(self.folder))

    def __call__(self, trainer: Trainer) -> None:
        if trainer.step_count % self.every:
            return
        for name in trainer.history.names():
            self.writer.add_scalar(name, trainer.history.last(name, self.every), trainer.step_count)
        self.writer.flush()

    def for_restart(self, name: str, others: object) -> TensorBoard:
        """Return a callback for the folder ``name`` inside."""
        return TensorBoard(self.folder / name, every=self.every)

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def as_callbacks(callbacks: object) -> tuple[Callback, ...]:
    """Return the functions of an option ``callbacks``; raise `OptionError` unless all can be called."""
    try:
        found: tuple[Callback, ...] = tuple(callbacks)  # type: ignore[arg-type]
    except TypeError as error:
        do = "Put a single one into a list, callbacks=[callback]."
        raise OptionError.must_be("callbacks", "a list of functions", repr(callbacks), do) from error
    for callback in found:
        _check_function("each of the callbacks", callback)
        if isinstance(callback, type):
            do = f"Pass an instance of it, {callback.__name__}(...)."
            raise OptionError.must_be("each of the callbacks", "a function of the trainer", callback, do)
    return found


def for_restart(callbacks: Iterable[Callback], name: str, others: object) -> tuple[Callback, ...]:
    """Return the callbacks of a restart: those with records are new, the others the same.

    Args:
        callbacks: Those of the first fit.
        name: Name of the restart's folders.
        others: The first fit's guide. A function that draws from it would watch the wrong fit.

    Raises:
        OptionError: A function of a callback names that guide.
    """
    return tuple(c.for_restart(name, others) if hasattr(c, "for_restart") else c for c in callbacks)


def _check_guide(function: Callable[..., Any], others: object) -> None:
    """Raise `OptionError` where a function of a callback refers to this guide by a name of its own."""
    try:
        named = inspect.getclosurevars(function)
    except TypeError:  # not a function of Python
        return
    for name, value in {**named.globals, **named.nonlocals}.items():
        if value is others:
            got = f"{name!r}, the guide of the first fit alone"
            raise OptionError.must_be(
                "a callback's guide", "that of each fit", got, "With restarts, use trainer.guide."
            )


def _forget_from(step: int, steps: list[int], values: list[Any]) -> None:
    """Remove the records of this step and later ones: the fit has gone back, or is another one."""
    while steps and steps[-1] >= step:
        del steps[-1], values[-1]


def _number(option: str, function: Diagnostic, trainer: Trainer) -> float:
    """Return the value of a user's diagnostic."""
    return as_float(f"the value of {option}", _call(function, trainer))


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
