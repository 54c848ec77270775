"""Compare the gradient of a log density with its own values, to find latents whose gradient is lost.

A latent that passes through ``float()``, numpy or ``detach`` changes the values of the log density but not its
gradient, and a fit that follows the gradient ends at the prior. Along a line the change of the values must be the
integral of the gradient. Simpson's rule gives that integral, and its difference from the trapezoidal rule a bound for
its error, also at a kink. Noise, as from rounding, differs between the two halves of a line; a lost gradient shows in
both, and at most points.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from implicitvi.errors import ModelError
from implicitvi.pyro_model.sites import Site, SiteLayout

Probe = Callable[[Tensor], tuple[Tensor, Tensor]]
STEPS = (0.01, 1.0, 0.1, 0.001)  # 1 finds jumps, as of a rounded latent; the last two follow where 0.01 is undecided
POINTS = 4  # the last of the given points
GROUPS = 6  # of sites that move together
SHARE = 0.05  # of a change of the values, which the gradient may miss
ADVICE = (
    "Keep latents in torch: float(), .item(), numpy, detach, no_grad, rounding and comparisons lose the gradient. Give "
    "a solver from elsewhere a torch.autograd.Function with a backward."
)


def check_gradient(probe: Probe, points: Tensor, exact: tuple[Tensor, Tensor], layout: SiteLayout) -> None:
    """Raise `ModelError` if values of a log density change along lines of several points and its gradient does not.

    Args:
        probe: Returns values ``[S, ...]`` and gradients ``[S, D]`` at points ``[S, D]``.
        points: Points ``[P, D]``.
        exact: The values ``[P, ...]`` and gradients ``[P, D]`` there.
        layout: The latent sites.
    """
    points, values, gradients = (each[-POINTS:] for each in (points, *exact))
    if len(points) < 2:
        return
    moves = _directions(gradients, layout, GROUPS)
    settled = False
    for step in STEPS:
        lost, agrees, change, told = _compare(probe, points, (values, gradients), step * moves)
        for group in (lost.sum(1) >= max(2, ceil(0.75 * len(points)))).nonzero()[:1, 0].tolist():
            sites, first = layout.sites[group::GROUPS], int(lost[group].nonzero()[0])
            if len(sites) > 1:
                alone = step * _directions(gradients, layout, len(layout.sites))[group::GROUPS]
                shown = _compare(probe, points, (values, gradients), alone)[0].any(1).tolist()
                sites = tuple(site for site, is_lost in zip(sites, shown, strict=True) if is_lost) or sites
            raise _lost(sites, float(change[group, first]), float(told[group, first]))
        settled |= step < 1 and bool((2 * agrees.sum(1) > len(points)).all())
        if settled and step != STEPS[0]:
            return


def _directions(gradients: Tensor, layout: SiteLayout, groups: int) -> Tensor:
    """Return a direction ``[G, P, D]`` at each point for every group of sites, at most 1 in each coordinate.

    Within a group, a site with a smaller gradient takes a larger step, so that each counts alike.
    """
    signs = 2 * torch.randint(2, gradients.shape).to(gradients) - 1
    group = torch.cat([torch.full((site.size,), i % groups) for i, site in enumerate(layout.sites)]).to(signs.device)
    sizes = [part.abs().mean(-1, keepdim=True).expand_as(part) for _, part in layout.split(gradients)]
    size = torch.cat(sizes, -1)
    size = size + 1e-3 * size.amax(-1, keepdim=True) + 1e-6
    inside = group == torch.arange(min(groups, len(layout.sites)), device=group.device)[:, None, None]
    least = torch.where(inside, size, torch.inf).amin(-1, keepdim=True)
    return torch.where(inside, signs * least / size, 0.0)


def _compare(
    probe: Probe, points: Tensor, exact: tuple[Tensor, Tensor], moves: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare values and gradients on the lines from ``points - moves`` to ``points + moves [G, P, D]``.

    Returns:
        Where the gradient is lost, and where it agrees closely; neither where rounding or a bend leaves it open. The
        change of the values in nats, and the one that the gradient tells. Each ``[G, P]``.
    """
    ends = torch.stack([points - moves, points + moves])
    values, slopes = probe(ends.flatten(0, 2))
    shape = ends.shape[:-1]
    before, after = values.reshape(len(values), -1).double().sum(1).view(shape)
    middle = exact[0].reshape(len(points), -1).double().sum(1)
    (g_before, g_after), g_middle = slopes.double().view(ends.shape), exact[1].double()
    left, right = (points - ends[0]).double(), (ends[1] - points).double()
    gaps = (
        middle - before - ((g_before + g_middle) * left).sum(-1) / 2,
        after - middle - ((g_middle + g_after) * right).sum(-1) / 2,
    )
    bend = ((2 * g_middle - g_before - g_after) * (left + right)).sum(-1) / 3
    change, gap = after - before, gaps[0] + gaps[1] - bend / 4
    size = torch.stack([before, middle.expand_as(before), after]).abs().amax(0)
    tolerance = 10 * bend.abs() + 50 * torch.finfo(points.dtype).eps * (1 + size)
    most = SHARE * torch.maximum(change.abs(), (change - gap).abs())
    repeats = 6 * (gaps[0] - gaps[1]).abs() < (gaps[0] + gaps[1]).abs()
    if (
        moves.abs().max() >= 1
    ):  # a long line: noise is small beside the change, and a gradient that says much is not lost
        repeats = 2 * (change - gap).abs() < change.abs()
    lost = (gap.abs() > tolerance) & (gap.abs() > most) & repeats
    return lost, torch.maximum(gap.abs(), tolerance) < most, change, change - gap


def _lost(sites: tuple[Site, ...], change: float, told: float) -> ModelError:
    names = ", ".join(repr(site.name) for site in sites)
    got = f"a change of {change:.3g} nats where the gradient tells {told:.3g}"
    what, expected = f"The gradient of {names} in the model", "that of its log density"
    return ModelError.must_be(what, expected, got, ADVICE, faq="the-gradient-of-a-latent-is-lost")
