"""What may watch a fit: any callable that takes the trainer after each step."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

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
                caption: f"{trainer.history.last(metric, self.every):.3f}"
                for metric, caption in self.labels.items()
            }
            self.bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
