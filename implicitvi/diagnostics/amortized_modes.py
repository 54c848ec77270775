"""Look for modes that an amortized guide has lost, by climbs from afar for each of some data.

A climb ends at a point with a log density as high as the median draw of its datum has. Where the density falls into a
valley on every straight way from there to the nearest draws, the point belongs to a mode that has no draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitvi.diagnostics.chains import climb
from implicitvi.diagnostics.report import Check
from implicitvi.errors import FitWarning, check_whole
from implicitvi.numerics.hmc import Point
from implicitvi.numerics.optimise import gradients, where_finite
from implicitvi.rng import RandomStream

Scores = Callable[[Tensor], Tensor]  # latents [S, B, D] of B data to their log densities [S, B] in nats
Count = tuple[int, int]  # data that lose a mode, and data looked at

DATA = 64  # data to look at, at most
DRAWS = 200  # of each datum
PAIRS = 8  # of climbs of each datum
SHARE = 0.02  # of the data that may seem to lose a mode
VALLEY = 3.0  # nats
NEAREST = 4  # draws to which ways are looked at
LOSES = (
    "The guide draws from one mode of them. Constrain the latents so that a datum has one mode (a sign, an order), "
    "or fit the data one by one without amortize=."
)


def lost_modes(score: Scores, draws: Tensor, *, num_pairs: int = PAIRS, num_steps: int = 80, seed: int = 0) -> Tensor:
    """Return a mask ``[B]`` of data that have a mode without draws.

    Args:
        score: ``z [S, B, D]`` to ``log p(x_i, z_i) [S, B]`` up to a constant of each datum, with gradients.
        draws: Draws ``[S, B, D]`` of each datum's posterior.
        num_pairs: Pairs of climbs of each datum, from opposite sides of its draws, up to 25 times as far out
            as the draws of all data are spread.
        num_steps: Steps of a climb, at most.
        seed: Random seed.

    >>> z = 1 + 0.1 * torch.randn(200, 3, 1, generator=torch.Generator().manual_seed(0))
    >>> lost_modes(lambda z: -((z**2 - 1) ** 2 / 0.08).sum(-1), z)
    tensor([True, True, True])
    >>> lost_modes(lambda z: -50 * ((z - 1) ** 2).sum(-1), z)
    tensor([False, False, False])
    """
    check_whole("num_pairs", num_pairs)
    check_whole("num_steps", num_steps)
    generator = torch.Generator().manual_seed(seed)
    middle, own = draws.mean(0), draws.std(0).clamp(min=1e-6)
    width = torch.logspace(0, 1.4, num_pairs).to(draws)[:, None, None] * draws.flatten(0, 1).std(0)
    noise = width * torch.randn(num_pairs, *middle.shape, generator=generator).to(draws)
    begin = torch.cat([noise, -noise]) / own  # in units of each datum's draws, from their mean
    shape = begin.shape

    def at(w: Tensor) -> Point:
        log_p, slope = gradients(
            lambda z: score(z.view(shape)).flatten(), (middle + own * w.view(shape)).flatten(0, 1), chunk=len(w)
        )
        return Point(w, *where_finite(log_p, (slope.view(shape) * own).flatten(0, 1)))

    with torch.no_grad():
        enough = score(draws[: 4 * num_pairs]).nan_to_num(-torch.inf).median(0).values
    ends = climb(at, begin.flatten(0, 1), enough.repeat(2 * num_pairs), num_steps)
    ends = (middle + own * ends.view(shape)).detach()
    with torch.no_grad():
        height = score(ends)
        far = (height >= enough) & enough.isfinite()
        for near in _nearest(ends, draws, own) if far.any() else ():
            far &= _has_valley(score, ends, near, height)
    return far.any(0)


def _nearest(ends: Tensor, draws: Tensor, own: Tensor) -> Tensor:
    """Return the `NEAREST` of the draws ``[R, B, D]`` to each of ``ends [S, B, D]``: ``[NEAREST, S, B, D]``."""
    found = []
    for end in ends:
        distance = ((draws - end) / own).square().sum(-1)
        which = distance.topk(NEAREST, 0, largest=False).indices
        found.append(draws.gather(0, which[..., None].expand(-1, -1, draws.shape[-1])))
    return torch.stack(found, 1)


def _has_valley(score: Scores, start: Tensor, end: Tensor, height: Tensor) -> Tensor:
    """Return a mask ``[S, B]`` of straight ways between points ``[S, B, D]`` on which the density falls and rises."""
    between = torch.stack([score(start.lerp(end, i / 6)) for i in range(1, 6)]).nan_to_num(-torch.inf).amin(0)
    return between < torch.minimum(height, score(end)) - VALLEY


@torch.no_grad()
def count_lost_modes(sampler: Any, source: Any, arguments: Any) -> Count | None:
    """Count the data of a minibatch that lose a mode, given one draw of the latents that all data share.

    Args:
        sampler: The guide's sampler of shared and local latents.
        source: Source of minibatches, with the log density of each datum.
        arguments: The model's arguments.

    Returns:
        The number of data that lose a mode, and the number looked at; ``None`` where the model is scored in a loop,
            which takes too long.
    """
    with RandomStream(0):
        batch = source.batch(arguments).pick(DATA)
        g = None if sampler.shared is None else sampler.shared(1)
        draws = sampler.local(DRAWS, sampler.context(batch.rows, g))[:, : len(batch.rows)]

        def score(z: Tensor) -> Tensor:
            terms: Tensor = source.terms(None if g is None else g.expand(len(z), -1), z, batch)
            return terms[:, 1:]

        score(draws[:2])
        if source.log_joint.mode == "loop":
            return None
        lost = lost_modes(score, draws)
    return int(lost.sum()), len(lost)


def warn_of_lost_modes(found: Count | None) -> None:
    """Warn where an amortized guide has lost a mode of some data."""
    if found is not None and found[0] > SHARE * found[1]:
        lost, count = found
        what = f"The draws of each datum must have all modes of its posterior, got {lost} of {count} data that lose one"
        warnings.warn(f"{what}. {LOSES}", FitWarning, stacklevel=5)


def check_lost_modes(found: Count | None) -> Check:
    """Return the row of a report for the modes of single data, as counted at the end of the run."""
    if found is None:
        return Check.left_out(
            "modes of data", "They are looked at when a run ends, unless the model is scored in a loop."
        )
    lost, count = found
    share = lost / count
    return Check.of(
        "modes of data", share, SHARE, f"{lost} of {count} data lose a mode", failed=share > SHARE, advice=LOSES
    )
