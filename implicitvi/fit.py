"""What a run returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi.guide import ImplicitGuide
from implicitvi.html import table
from implicitvi.training import History, RandomStream

COLUMNS = ("", "mean", "sd", "5%", "50%", "95%")  # of a summary
SHOWN = 20  # rows of it in a notebook


@dataclass(frozen=True)
class Fit:
    """A trained guide and the record of its training.

    Attributes:
        guide: The trained guide.
        history: Metrics of every step: ``sampler`` and ``adversary`` (their losses), ``elbo``,
            ``beta``, ``dropped``.
        num_steps: Steps taken so far, over all runs.
        seconds: Wall time of this run, the one-off costs included.
        setup_seconds: The part of it that went to the layout, the choice of log joint, compiling and the warm start.
        stop_reason: ``"finished"``, ``"interrupted"`` or a callback's message.
        skipped: Turns skipped because a loss or gradient was not finite.
        log_joint: How the model was scored, and why.
        parameters: Values of the model's parameters that were learned with the posterior, by name.
    """

    guide: ImplicitGuide
    history: History
    num_steps: int
    seconds: float
    setup_seconds: float
    stop_reason: str
    skipped: int
    log_joint: str
    parameters: dict[str, Tensor]

    @property
    def losses(self) -> NDArray[np.float64]:
        """The sampler's loss at every step in nats: the negative learned ELBO, an estimate and no bound."""
        return self.history["sampler"]

    @property
    def dropped(self) -> int:
        """Draws dropped because the model gave them no finite log density."""
        return int(self.history["dropped"].sum())

    def summary(self, num_samples: int = 4000) -> str:
        """The record, then mean, sd and quantiles of every latent entry over ``num_samples`` draws."""
        rows = [COLUMNS, *_rows(self.guide.sample(num_samples))]
        lines = [f"{name:16}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in rows]
        return "\n".join([str(self), *lines])

    def _repr_html_(self) -> str:
        """The summary for a notebook: its first rows, from draws that leave no trace in the random numbers."""
        learned = {f"{name} (parameter)": value for name, value in self.parameters.items()}
        rows = [[*cells, "", "", "", ""] for cells in islice(_entries(learned), SHOWN)]
        if self.guide.amortization is None:  # one posterior, and not one for each set of data
            with RandomStream(0):
                draws = self.guide.sample(1000)
            rows += islice(_rows(draws), SHOWN)
            left = sum(value[0].numel() for value in draws.values()) - SHOWN
            rows += [[f"and {left} more", *[""] * 5]] if left > 0 else []
        return table(str(self), COLUMNS, rows)

    def __str__(self) -> str:
        loss = self.history.last("sampler", 100)
        return (
            f"{self.stop_reason} after {self.num_steps} steps, {self.seconds:.1f} s of which "
            f"{self.setup_seconds:.1f} s before the first; loss {loss:.3f} nats (an estimate, no bound); "
            f"{self.skipped} turns skipped, {self.dropped} draws dropped; log joint by {self.log_joint}"
        )


def _rows(draws: dict[str, Tensor]) -> Iterator[list[str]]:
    """Name, mean, sd and quantiles of every entry of draws ``{site: [S, ...]}``."""
    for name, value in draws.items():
        indices = np.ndindex(*value.shape[1:])
        for index, column in zip(indices, value.reshape(len(value), -1).T, strict=True):
            marks = column.quantile(column.new_tensor([0.05, 0.5, 0.95]))
            numbers = torch.stack([column.mean(), column.std(), *marks]).tolist()
            yield [_label(name, index), *(f"{number:.3f}" for number in numbers)]


def _entries(values: dict[str, Tensor]) -> Iterator[list[str]]:
    """Name and value of every entry of tensors."""
    for name, value in values.items():
        for index, entry in zip(np.ndindex(*value.shape), value.flatten().tolist(), strict=True):
            yield [_label(name, index), f"{entry:.3f}"]


def _label(name: str, index: tuple[int, ...]) -> str:
    return name + (f"[{','.join(map(str, index))}]" if index else "")
