"""What a run returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi.errors import SetupError
from implicitvi.guide import ImplicitGuide
from implicitvi.training import History


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
        seed: Seed of the fit, ``None`` where it was drawn.
        write: Writes the fit into a folder; see `save`.
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
    seed: int | None = None
    write: Callable[[str | Path], None] | None = field(default=None, repr=False, compare=False)

    def save(self, folder: str | Path) -> None:
        """Write everything that training and drawing need into a folder; `AVBSVI.load` reads it.

        The state is the present one: of a guide that has been trained further it is the later one.

        Raises:
            SetupError: The fit was not made by `AVBSVI`.
        """
        if self.write is None:
            raise SetupError(
                "only fits made by AVBSVI can be saved",
                do="Save the guide's state_dict(), or write fit = AVBSVI(...).run(...).",
            )
        self.write(folder)

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
        rows = [f"{'':16}{'mean':>10}{'sd':>10}{'5%':>10}{'50%':>10}{'95%':>10}"]
        for name, value in self.guide.sample(num_samples).items():
            indices = np.ndindex(*value.shape[1:])
            for index, column in zip(indices, value.reshape(num_samples, -1).T, strict=True):
                label = name + (f"[{','.join(map(str, index))}]" if index else "")
                marks = column.quantile(column.new_tensor([0.05, 0.5, 0.95]))
                numbers = torch.stack([column.mean(), column.std(), *marks]).tolist()
                rows.append(f"{label:16}" + "".join(f"{number:10.3f}" for number in numbers))
        return "\n".join([str(self), *rows])

    def __str__(self) -> str:
        loss = self.history.last("sampler", 100)
        return (
            f"{self.stop_reason} after {self.num_steps} steps, {self.seconds:.1f} s of which "
            f"{self.setup_seconds:.1f} s before the first; loss {loss:.3f} nats (an estimate, no bound); "
            f"{self.skipped} turns skipped, {self.dropped} draws dropped; log joint by {self.log_joint}"
        )
