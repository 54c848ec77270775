"""Hold a trained guide with the record of its training: `Fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from implicitvi.avb.multimodal import MixtureSampler
from implicitvi.diagnostics.agreement import Agreement
from implicitvi.diagnostics.diagnose import diagnose, stein_error
from implicitvi.diagnostics.refine import Polished, Resampled, polish, resample
from implicitvi.diagnostics.report import Report
from implicitvi.errors import OptionError, SetupError, as_float, check_function
from implicitvi.inference.copies import Copyable
from implicitvi.inference.guide import ImplicitGuide, quantiles_of
from implicitvi.inference.minibatches import dataset
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.rng import RandomStream
from implicitvi.training import History
from implicitvi.training.html import table

COLUMNS = ("", "mean", "sd", "5%", "50%", "95%")  # of a summary
SHOWN = 20  # rows of it in a notebook


@dataclass(frozen=True, eq=False)
class Fit(Copyable):
    """A trained guide with the record of its training.

    Attributes:
        guide: The trained guide.
        history: Metrics of every step: ``sampler`` and ``adversary`` (their losses), ``elbo``,
            ``beta``, ``dropped``.
        num_steps: Steps taken so far, over all runs.
        seconds: Wall time of this run, the one-off costs included.
        setup_seconds: The part of it before the first step: layout, choice of log joint, compiling and warm start.
        stop_reason: ``"finished"``, ``"interrupted"`` or a callback's message; in rounds ``"converged"`` or
            ``"not converged"``.
        report: Judgement of the draws at the end of rounds; ``None`` after a fixed number of steps.
        skipped: Turns skipped because a loss or gradient was not finite.
        log_joint: Mode of scoring the model, and the reason for it.
        parameters: Values of the model's parameters that were learned with the posterior, by name.
        model: The model that was fitted.
        args: Its arguments in the run.
        kwargs: Its keyword arguments.
        restarts: The other fits of a run with ``restarts``, each with a guide of its own.
        agreement: Comparison of all of them; ``None`` without restarts, and for amortized guides.
        seed: Seed of the fit, ``None`` if it was drawn.
        lost_modes: For an amortized guide, the number of data that lost a mode of their posterior, and the number
            looked at when the run ended; ``None`` where none was looked at.
        write: Function that writes the fit into a folder; see `save`.
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
    model: Callable[..., Any] = field(repr=False)
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    restarts: tuple[Fit, ...] = ()
    agreement: Agreement | None = None
    seed: int | None = None
    lost_modes: tuple[int, int] | None = None
    report: Report | None = None
    write: Callable[[str | Path], None] | None = field(default=None, repr=False, compare=False)

    def save(self, folder: str | Path) -> None:
        """Write everything that training and drawing need into a folder; `AVBSVI.load` reads it.

        Each restart has a folder of its own inside. The state is the present one, later than this fit if its guide has
        been trained further.

        Raises:
            SetupError: The fit was not made by `AVBSVI`.
        """
        if self.write is None:
            advice = "Save the guide's state_dict(), or write fit = AVBSVI(...).run(...)."
            raise SetupError(f"The fit must be made by AVBSVI to be saved. {advice}")
        self.write(folder)
        for key, other in enumerate(self.restarts, 1):
            other.save(restart_folder(folder, key))

    @property
    def losses(self) -> NDArray[np.float64]:
        """The sampler's loss at every step in nats: the negative learned ELBO, an estimate and not a bound."""
        return self.history["sampler"]

    @property
    def dropped(self) -> int:
        """Number of draws dropped because the model gave them no finite log density."""
        return int(self.history["dropped"].sum())

    @property
    def fits(self) -> tuple[Fit, ...]:
        """This fit and its restarts."""
        return self, *self.restarts

    def best(self, criterion: Callable[[Fit], float] | None = None) -> Fit:
        """Return the one of `fits` whose draws are nearest to the posterior.

        Args:
            criterion: Function of a fit, lower is better, that is finite for one of them at least; ``None`` for the
                kernel Stein discrepancy of the draws. Never use the loss: a collapsed fit can have the best of all. A
                discrepancy does not see missing modes: `agreement` compares those.

        Raises:
            OptionError: The criterion is not a function of a fit to a number that is finite for one of them.
        """
        if criterion is not None:
            expected = "a function of a fit, lower is better, and not the loss, which is not a bound"
            check_function("the criterion", criterion, expected)
        judge = criterion or (lambda fit: stein_error(fit.guide, self.model, *self.args, **self.kwargs))
        values = [as_float("the value of the criterion", judge(fit)) for fit in self.fits]
        if not any(map(isfinite, values)):
            raise OptionError.must_be("the criterion", "finite for one of the fits, not finite for all", values)
        return self.fits[min(range(len(values)), key=lambda i: (not isfinite(values[i]), values[i]))]

    def mixture(self, *args: Any, **kwargs: Any) -> ImplicitGuide:
        """Return a guide that draws from all of `fits` equally often; it has no learned density.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Raises:
            SetupError: The guide is amortized.
        """
        if self.guide.amortization is not None:
            raise SetupError("The guide must not be amortized to be mixed. Use one of fit.fits.")
        guide = self.guide.fresh_copy().setup(*args, **kwargs)
        samplers = [fit.guide.sampler for fit in self.fits]
        guide.sampler = MixtureSampler(samplers, torch.ones(len(samplers))).to(samplers[0].loc)
        return guide

    def summary(self, num_samples: int = 4000) -> str:
        """Return the record, then mean, sd and quantiles of every latent entry over ``num_samples`` draws.

        The draws are those of the run's data; of the first dataset where the guide is amortized over datasets.
        """
        rows = [COLUMNS, *_rows(self._draws(num_samples))]
        widths = [max(10, 1 + max(map(len, column))) for column in list(zip(*rows, strict=True))[1:]]
        lines = [
            f"{name:16}" + "".join(f"{cell:>{n}}" for n, cell in zip(widths, cells, strict=True))
            for name, *cells in rows
        ]
        return "\n".join([str(self), *lines])

    def _repr_html_(self) -> str:
        """Return the summary for a notebook: its first rows, from draws that leave the random numbers alone."""
        learned = {f"{name} (parameter)": value for name, value in self.parameters.items()}
        rows = [[*cells, "", "", "", ""] for cells in islice(_entries(learned), SHOWN)]
        with RandomStream(0):
            draws = self._draws(1000)
        rows += islice(_rows(draws), SHOWN)
        left = sum(value[0].numel() for value in draws.values()) - SHOWN
        rows += [[f"and {left} more", *[""] * 5]] if left > 0 else []
        return table(str(self), COLUMNS, rows)

    def diagnose(self, *, num_samples: int = 2000, seed: int = 0) -> Report:
        """Judge whether the fit can be trusted: `implicitvi.diagnose` with the run's arguments.

        Args:
            num_samples: Draws to judge.
            seed: Random seed.

        Raises:
            ModelError: The model saw minibatches of its data.
        """
        judge: Callable[..., Report] = diagnose
        return judge(self, self._as_run, *self.args, num_samples=num_samples, seed=seed)

    def resample(self, *, num_samples: int = 4000, seed: int = 0) -> Resampled:
        """Resample draws by their importance weights: `diagnostics.refine.resample` with the run's arguments.

        Args:
            num_samples: Draws to return, of four times as many of the guide.
            seed: Random seed.

        Raises:
            SetupError: The guide is amortized.
            ModelError: The density cannot be learned well enough for weights, or a few draws have most of the weight.
        """
        return resample(self.guide, self._as_run, *self.args, num_samples=num_samples, seed=seed)

    def polish(self, num_steps: int = 15, *, num_samples: int = 4000, seed: int = 0) -> Polished:
        """Move draws by a few steps of HMC: `diagnostics.refine.polish` with the run's arguments.

        Args:
            num_steps: Transitions of Hamiltonian Monte Carlo, of six gradients each.
            num_samples: Draws, each a chain.
            seed: Random seed.

        Raises:
            SetupError: The guide is amortized.
        """
        return polish(self.guide, self._as_run, *self.args, num_steps=num_steps, num_samples=num_samples, seed=seed)

    def _draws(self, num_samples: int) -> dict[str, Tensor]:
        """Draw the posterior of the run's data, or of the first of its datasets."""
        data, amortization = Arguments(self.args, self.kwargs), self.guide.amortization
        if amortization is None:
            return self.guide.sample(num_samples)
        if amortization.plate is None:
            data = dataset(0, data)
        return self.guide.sample(num_samples, *data.args, **data.kwargs)

    @property
    def _as_run(self) -> Callable[..., Any]:
        """The model with its keyword arguments, whose names may be those of options of this class."""
        return partial(self.model, **self.kwargs) if self.kwargs else self.model

    def __str__(self) -> str:
        loss = self.history.last("sampler", 100)
        agreed = "" if self.agreement is None else f"; {self.agreement}"
        return (
            f"{self.stop_reason} after {self.num_steps} steps, {self.seconds:.1f} s of which "
            f"{self.setup_seconds:.1f} s before the first; loss {loss:.3f} nats (an estimate, not a bound); "
            f"{self.skipped} turns skipped, {self.dropped} draws dropped; log joint by {self.log_joint}{agreed}"
        )


def restart_folder(folder: str | Path, key: int) -> Path:
    """Return the folder of the restart of this number, counted from 1, inside a fit's folder."""
    return Path(folder) / f"restart-{key}"


def _rows(draws: dict[str, Tensor]) -> Iterator[list[str]]:
    """Yield name, mean, sd and quantiles of every entry of draws ``{site: [S, ...]}``."""
    for name, value in draws.items():
        indices = np.ndindex(*value.shape[1:])
        for index, column in zip(indices, value.reshape(len(value), -1).T, strict=True):
            marks = quantiles_of(column, column.new_tensor([0.05, 0.5, 0.95]))
            numbers = torch.stack([column.mean(), column.std(), *marks]).tolist()
            yield [_label(name, index), *map(_number, numbers)]


def _entries(values: dict[str, Tensor]) -> Iterator[list[str]]:
    """Yield name and value of every entry of tensors."""
    for name, value in values.items():
        for index, entry in zip(np.ndindex(*value.shape), value.flatten().tolist(), strict=True):
            yield [_label(name, index), _number(entry)]


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.4g}"


def _label(name: str, index: tuple[int, ...]) -> str:
    return name + (f"[{','.join(map(str, index))}]" if index else "")
