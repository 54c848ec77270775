"""Annealed importance sampling."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LogJoint = Callable[[Tensor], Tensor]


def ais(log_joint: LogJoint, loc: Tensor, scale: Tensor) -> Tensor:
    """To come."""
    raise NotImplementedError
