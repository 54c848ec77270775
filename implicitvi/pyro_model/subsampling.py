"""Draw the indices of subsampled plates once for all particles."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
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


def rewind() -> Callable[[], None]:
    """Return a function that sets the generators of torch, numpy and Python to their present states."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def set_back() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])

    return set_back


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the generators of numpy and Python with 0 inside the ``with`` block."""
    set_back = rewind()
    np.random.seed(0)
    random.seed(0)
    try:
        yield
    finally:
        set_back()


def own_minibatches(first: Any, second: Any) -> dict[str, tuple[int, int]]:
    """Compare two scored traces at the same latents and arguments, with the indices of subsampled plates pinned.

    Returns size and minibatch size of the plates whose indices the model draws itself, by name, and those of the
    observed sites outside of them whose data change from run to run; the size of the latter is not known and 0.
    """
    changed = {k: node for k, node in first.nodes.items() if k in second.nodes and _differs(node, second.nodes[k])}
    plates = {k: (node["fn"].size, len(node["value"])) for k, node in changed.items() if site_is_subsample(node)}
    sites = {
        k: (0, int(node["value"].numel()))
        for k, node in changed.items()
        if node["is_observed"] and not any(frame.name in plates for frame in node["cond_indep_stack"])
    }
    return plates | sites


def _differs(a: Any, b: Any) -> bool:
    """Return whether two nodes of a site have other data; those of a `pyro.factor` are its log density."""
    if a["type"] != "sample" or not (a["is_observed"] or site_is_subsample(a)):
        return False
    x, y = a["value"], b["value"]
    if not x.numel() and "log_prob_sum" in a:
        return not torch.allclose(a["log_prob_sum"], b["log_prob_sum"], rtol=1e-3, atol=1e-3, equal_nan=True)
    return x.shape != y.shape or not bool(((x == y) | (x != x)).all())


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
