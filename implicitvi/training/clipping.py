"""How large a gradient may be."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

SURGE = 4.0  # a gradient this many times the usual one is cut to it
RATE = 0.02  # share of the present norm in what is usual


class Clip:
    """A bound of the norm of one player's gradients: a number, or a multiple of what the norm has been lately.

    A sampler that comes to where its adversary knows nothing gets a gradient far above all before. Adam's second
    moments have not seen its like and let it through as a step some sixteen times the rate, in every weight at once:
    enough to throw the sampler out of sight for good. A bound by what is usual stops that, and nothing else, whatever
    the units of the loss.

    Args:
        norm: The bound; ``None`` for `SURGE` times the running mean of the norms, each counted as it was cut.

    >>> clip = Clip(None)
    >>> [round(clip.shrink(torch.tensor(norm)).item(), 3) for norm in (1.0, 1.0, 400.0, 1.0)]
    [1.0, 1.0, 0.01, 1.0]

    References:
        AutoClip: Adaptive Gradient Clipping for Source Separation Networks, Prem Seetharaman, Gordon Wichern,
        Bryan Pardo, Jonathan Le Roux, 2020, for bounds by past norms.
    """

    def __init__(self, norm: float | None):
        self.norm = norm
        self.usual: Tensor | None = None
        self.count = 0

    def shrink(self, norm: Tensor) -> Tensor:
        """What a gradient of this norm, a scalar, is to be multiplied by, at most 1; a finite one is remembered."""
        if self.norm is not None:
            return (self.norm / norm).clamp(max=1.0)
        usual = torch.full_like(norm, inf) if self.usual is None else self.usual
        usual = torch.where(usual > 0, usual, inf)
        factor = (SURGE * usual / norm).clamp(max=1.0)
        self.count += 1
        seen = torch.where(norm.isfinite(), norm * factor, usual)
        known = usual.isfinite()
        mean = usual.lerp(seen, max(RATE, 1 / self.count))
        self.usual = torch.where(known, mean, seen)
        return factor

    def state_dict(self) -> dict[str, Tensor | int | None]:
        """What is usual, copied."""
        return {"usual": None if self.usual is None else self.usual.clone(), "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor | int | None], like: Tensor) -> None:
        """Take over what `state_dict` gave, on the device of ``like``."""
        usual, count = state["usual"], state["count"]
        self.usual = usual.to(like) if isinstance(usual, Tensor) else None
        self.count = int(count or 0)
