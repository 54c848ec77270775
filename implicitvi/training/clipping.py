"""Bound the norm of gradients."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

SURGE = 4.0  # a gradient is cut to this many times the usual norm
RATE = 0.02  # share of the present norm in the usual one


class Clip:
    """A bound on the norm of one player's gradients: a number, or a multiple of the recent norms.

    When the sampler reaches a region that the adversary has not seen, its gradient can be orders of magnitude too
    large; Adam turns it into a step of about sixteen times the rate in every weight at once, enough to lose the sampler
    for good. A bound relative to recent norms prevents this, whatever the units of the loss.

    Args:
        norm: The bound; ``None`` for `SURGE` times the running mean of the norms, each counted after it was cut.

    >>> clip = Clip(None)
    >>> [round(clip.shrink(torch.tensor(norm)).item(), 3) for norm in (1.0, 1.0, 400.0, 1.0)]
    [1.0, 1.0, 0.01, 1.0]

    References:
        AutoClip: Adaptive Gradient Clipping for Source Separation Networks, Seetharaman, Wichern, Pardo, Le Roux, 2020.
    """

    def __init__(self, norm: float | None):
        self.norm = norm
        self.usual: Tensor | None = None
        self.count = 0

    def shrink(self, norm: Tensor) -> Tensor:
        """Return the factor, at most 1, for a gradient of this norm, a scalar; a finite norm is remembered."""
        if self.norm is not None:
            return (self.norm / norm).clamp(max=1.0)
        usual = torch.full_like(norm, inf) if self.usual is None else self.usual
        usual = torch.where(usual > 0, usual, inf)
        factor = (SURGE * usual / norm).clamp(max=1.0)
        self.count += 1
        seen = torch.where(norm.isfinite(), norm * factor, usual)
        mean = usual.lerp(seen, max(RATE, 1 / self.count))
        self.usual = torch.where(usual.isfinite(), mean, seen)
        return factor

    def state_dict(self) -> dict[str, Tensor | int | None]:
        """Return a copy of the running mean and the number of norms in it."""
        return {"usual": None if self.usual is None else self.usual.clone(), "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor | int | None], like: Tensor) -> None:
        """Take over a state that `state_dict` returned, on the device of ``like``."""
        usual, count = state["usual"], state["count"]
        self.usual = usual.to(like) if isinstance(usual, Tensor) else None
        self.count = int(count or 0)
