"""Bars: codes that can be drawn but not scored, and noisy images of them.

Images of 8 x 8 pixels show four rows and four columns, each two pixels wide. A code says which of the eight are on;
two of the rows and one of the columns always are, so the bits of a code depend on each other and 24 codes of 256 occur.
After the bars problem of P. Földiák, Forming sparse representations by local anti-Hebbian learning, 1990.
"""

from __future__ import annotations

import torch
from torch import Tensor

from implicitvi.errors import OptionError, ShapeError, check_at_least

__all__ = ["bar_codes", "bar_images", "or_bars"]

ROWS, COLUMNS, WIDTH = 4, 4, 2


def bar_codes(num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw codes: two of four rows and one of four columns, uniformly.

    Args:
        num_samples: Number ``N`` of draws.
        generator: Source of randomness; ``None`` for torch's own.

    Returns:
        Bits ``[N, 8]``, rows first.

    >>> codes = bar_codes(5)
    >>> codes[:, :4].sum(1), codes[:, 4:].sum(1)
    (tensor([2., 2., 2., 2., 2.]), tensor([1., 1., 1., 1., 1.]))
    """
    check_at_least("num_samples", num_samples, 1)
    rows = torch.rand(num_samples, ROWS, generator=generator)
    columns = torch.rand(num_samples, COLUMNS, generator=generator)
    return torch.cat([_greatest(rows, 2), _greatest(columns, 1)], 1)


def bar_images(codes: Tensor) -> Tensor:
    """The images of codes without noise: a pixel is on where its row or its column is.

    Args:
        codes: Bits ``[N, 8]``, rows first.

    Returns:
        Pixels ``[N, 1, 8, 8]``, 0 or 1.
    """
    if codes.dim() != 2 or codes.shape[1] != ROWS + COLUMNS:
        raise ShapeError("the codes have the wrong shape", got=list(codes.shape), expected="[N, 8]")
    wide = codes.repeat_interleave(WIDTH, 1)
    rows, columns = wide.split([ROWS * WIDTH, COLUMNS * WIDTH], 1)
    return torch.maximum(rows[:, None, :, None], columns[:, None, None, :])


def or_bars(num_samples: int, *, flip: float = 0.15, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw images of bars with noise, and their codes.

    Args:
        num_samples: Number ``N`` of draws.
        flip: Probability that a pixel shows the opposite.
        generator: Source of randomness; ``None`` for torch's own.

    Returns:
        Pixels ``[N, 1, 8, 8]`` and bits ``[N, 8]``.
    """
    if not 0 <= flip <= 0.5:
        raise OptionError("flip is out of range", got=flip, expected="0 to 0.5")
    codes = bar_codes(num_samples, generator=generator)
    clean = bar_images(codes)
    flipped = torch.rand(clean.shape, generator=generator) < flip
    return torch.where(flipped, 1 - clean, clean), codes


def _greatest(scores: Tensor, count: int) -> Tensor:
    """1 for the ``count`` greatest scores of each row, else 0."""
    return torch.zeros_like(scores).scatter(1, scores.topk(count, 1).indices, 1.0)
