"""What is measured of a method's draws.

A new figure is a function of `Draws` that joins `FIGURES`; where it does not apply it returns ``None``. The score of
the posterior at the draws is ``draws.target.score(draws.target.unconstrain(draws.found))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from implicitvi.diagnostics.stein import kernel_stein
from implicitvi.errors import OptionError
from implicitvi.metrics import c2st, knn_kl, mean_error, sd_ratio, sliced_wasserstein, whiten
from suite.target import Target

JUDGED = 5000  # draws of each side for the figures whose time or noise depends on their number
STEIN = 2000  # of them for the kernel Stein discrepancy: noise of about 1 / sqrt(2000)
Figure = float | None


@dataclass(frozen=True)
class Draws:
    """Draws of a method beside those of the truth, in the target's coordinates of judgement.

    Attributes:
        target: Whose posterior it is.
        found: Draws to judge ``[N, D]``, in random order.
        near: Independent draws of the truth, as many, for what compares draw with draw.
        truth: All of them, for moments.
    """

    target: Target
    found: Tensor
    near: Tensor
    truth: Tensor

    @cached_property
    def white(self) -> tuple[Tensor, Tensor]:
        """Both sets in the frame where the truth has mean 0 and covariance ``I``."""
        return whiten(self.found, self.truth), whiten(self.near, self.truth)


def of_method(target: Target, found: Tensor) -> Draws:
    """The draws of a method, shuffled: those of a chain are in its order."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    truth = target.reference
    return Draws(target, found[order], truth[: target.num_draws], truth)


def of_truth(target: Target) -> Draws:
    """Draws of the truth beside others of it: what no method can be seen to beat."""
    truth, num = target.reference, target.num_draws
    return Draws(target, truth[num : 2 * num], truth[:num], truth[:num])


def divergence(draws: Draws, *, reverse: bool) -> Figure:
    """KL by nearest neighbours; of a chain that stood still there is none."""
    q, p = draws.white
    try:
        return knn_kl(p, q) if reverse else knn_kl(q, p)
    except OptionError:
        return None


def tell_apart(draws: Draws) -> Figure:
    """C2ST of at most `JUDGED` draws a side: figures of different numbers of draws cannot be compared."""
    return c2st(draws.found[:JUDGED], draws.near[:JUDGED])


def transport(draws: Draws) -> Figure:
    """Sliced W2 in standard deviations of the truth."""
    return sliced_wasserstein(*(side[:JUDGED] for side in draws.white))


def mode_error(draws: Draws) -> Figure:
    """Largest error of the share of a mode."""
    modes = draws.target.modes
    if modes is None:
        return None
    truth = modes(draws.truth).bincount()
    found = modes(draws.found).bincount(minlength=len(truth))
    return float((found / found.sum() - truth / truth.sum()).abs().max())


def stein(draws: Draws) -> Figure:
    """Mean error of the score by a kernel, in standard deviations; where the model breaks at a draw there is none."""
    target = draws.target
    u = target.unconstrain(draws.found[:STEIN]).to(torch.get_default_dtype())
    try:
        return kernel_stein(u, target.score(u)[1], num_bootstrap=1).score_error
    except (torch.linalg.LinAlgError, ValueError):  # type: ignore[attr-defined]
        return None


FIGURES: dict[str, Callable[[Draws], Figure]] = {
    "c2st": tell_apart,
    "mean_error": lambda draws: mean_error(draws.found, draws.truth),
    "sd_low": lambda draws: sd_ratio(draws.found, draws.truth)[0],
    "sd_high": lambda draws: sd_ratio(draws.found, draws.truth)[1],
    "kl_qp": lambda draws: divergence(draws, reverse=False),
    "kl_pq": lambda draws: divergence(draws, reverse=True),
    "sliced_w2": transport,
    "mode_error": mode_error,
    "stein": stein,
}


def measure(draws: Draws) -> dict[str, Figure]:
    """Every figure by name."""
    return {name: figure(draws) for name, figure in FIGURES.items()}
