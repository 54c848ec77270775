"""Type aliases shared by several folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Model = Callable[..., Any]  # a Pyro model
LogDensity = Callable[[Tensor], Tensor]  # points [S, D] to log densities [S] in nats
Draws = Mapping[str, Any]  # {site: [S, *site shape]}, constrained
