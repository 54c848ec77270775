"""Sample and integrate a one-dimensional density on a fine grid in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]

LOG_2PI = math.log(2 * math.pi)
CELLS = 2**16


def uniform(shape: int | tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers on [0, 1) in float64."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def noise(shape: int | tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw standard normal numbers in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def log_integral(log_density: LogDensity, low: float, high: float) -> float:
    """Return the log integral by the midpoint rule, for a smooth density that vanishes at both ends."""
    return float(_cell_weights(log_density, low, high)[1].logsumexp(0))


def inverse_cdf_draws(
    log_density: LogDensity, low: float, high: float, num_samples: int, generator: torch.Generator | None
) -> Tensor:
    """Draw ``[S]`` by the inverse distribution function, uniformly inside each of 65,536 cells."""
    midpoints, log_weights = _cell_weights(log_density, low, high)
    cumulative = log_weights.softmax(0).cumsum(0)
    level = uniform(num_samples, generator) * cumulative[-1]
    cell = torch.searchsorted(cumulative, level, right=True).clamp(max=CELLS - 1)
    width = (high - low) / CELLS
    return midpoints[cell] + width * (uniform(num_samples, generator) - 0.5)


def _cell_weights(log_density: LogDensity, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return midpoints of equal cells and the log mass of each, float64 ``[CELLS]``."""
    width = (high - low) / CELLS
    midpoints = low + width * (torch.arange(CELLS, dtype=torch.float64) + 0.5)
    return midpoints, log_density(midpoints) + math.log(width)
