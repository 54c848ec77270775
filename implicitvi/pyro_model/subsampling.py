"""Draw the indices of subsampled plates once for all particles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from implicitvi.errors import ModelError

Plate = tuple[int, int, str | torch.device]


def draw_subsample(size: int, subsample_size: int, device: str | torch.device = "cpu") -> Tensor:
    """Draw ``subsample_size`` of the numbers below ``size``, each set equally likely: ``[subsample_size]``, ascending.

    Numbers are drawn until enough are distinct, in time that does not grow with ``size``, unlike a random permutation.
    A permutation is used for more than half of the numbers, and on an accelerator, where it is faster.

    >>> draw_subsample(10, 10)
    tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    drawn: Tensor
    if 2 * subsample_size > size or torch.device(device).type != "cpu":
        drawn = torch.randperm(size, device=device)[:subsample_size].sort().values
        return drawn
    drawn = torch.randint(size, (subsample_size,)).unique()
    while len(drawn) < subsample_size:  # new numbers among further draws are uniform over the remaining ones
        drawn = torch.cat([drawn, torch.randint(size, (subsample_size - len(drawn),))]).unique()
    return drawn


def check_subsample(msg: Any) -> None:
    """Raise `ModelError` if a minibatch is larger than its plate."""
    plate = msg["fn"]
    if plate.subsample_size is not None and plate.subsample_size > plate.size >= 0:
        what, most = f"subsample_size of plate {msg['name']!r}", f"at most {plate.size}"
        raise ModelError.must_be(what, most, plate.subsample_size)


def full_size(frame: Any) -> int:
    """Return the number of elements of a whole plate, of which a run may see a minibatch."""
    return int(frame.full_size or frame.size)


def is_subsampled(frame: Any) -> bool:
    """Return whether a run sees only a minibatch of a plate."""
    return full_size(frame) != int(frame.size)


class PinnedSubsample(Messenger):
    """A messenger that gives the subsampled plates of a model their indices.

    Within `pinned` a plate keeps the indices of its first use, so that all particles see the same rows.

    Attributes:
        plates: Size, subsample size and device of every subsampled plate seen so far, by name.
        indices: The indices in use, by name of the plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, Plate] = {}
        self.indices: dict[str, Tensor] = {}

    @contextmanager
    def pinned(self, indices: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
        """Use these indices, by name of the plate, inside the ``with`` block; draw those of other plates once."""
        outside, self.indices = self.indices, dict(indices or {})
        try:
            yield self.indices
        finally:
            self.indices = outside

    def draw(self, name: str) -> Tensor:
        """Draw new indices of a plate that has been seen."""
        return draw_subsample(*self.plates[name])

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) or msg["value"] is not None:
            return
        check_subsample(msg)
        name, plate = msg["name"], msg["fn"]
        if plate.subsample_size is None or plate.subsample_size >= plate.size:
            return
        self.plates[name] = (plate.size, plate.subsample_size, plate.device)
        if name not in self.indices:
            self.indices[name] = self.draw(name)
        msg["value"] = self.indices[name]
