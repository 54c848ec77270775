"""Indices of subsampled plates are uniform without replacement, and the same for all particles."""

from __future__ import annotations

from collections import Counter

import pyro
import pytest
import torch

import models
from implicitvi.pyro_model.subsampling import PinnedSubsample, draw_subsample


@pytest.mark.parametrize(("size", "count"), [(5, 2), (6, 3), (5, 3), (3, 3)])
def test_every_set_is_equally_likely(size: int, count: int) -> None:
    """Check each frequency in 20 000 draws, over all sets, to 5 standard errors.

    Fails by chance less than once in 100 000 runs. Planted: keeping the lowest of a larger set of distinct draws,
    or filling up with the first numbers that are missing, is 10 and more standard errors off.
    """
    draws = 20_000
    seen = Counter(tuple(draw_subsample(size, count).tolist()) for _ in range(draws))
    sets = list(torch.combinations(torch.arange(size), count).tolist())
    assert set(seen) == {tuple(each) for each in sets}
    share = 1 / len(sets)
    error = (draws * share * (1 - share)) ** 0.5
    assert max(abs(times - draws * share) for times in seen.values()) <= 5 * error


def test_numbers_are_distinct_and_in_range() -> None:
    for size, count in ((1, 1), (10**6, 1000), (1000, 500), (1000, 501), (7, 0)):
        drawn = draw_subsample(size, count)
        assert drawn.shape == drawn.unique().shape == (count,)
        assert drawn.dtype == torch.int64
        assert count == 0 or (drawn.min() >= 0 and drawn.max() < size)


def test_a_plate_keeps_its_indices_within_and_not_beyond() -> None:
    minibatch = PinnedSubsample()
    seen = []

    def model() -> None:
        with pyro.plate("rows", 1000, subsample_size=5) as index:
            seen.append(index.tolist())
        with pyro.plate("all", 3) as index:
            assert index.tolist() == [0, 1, 2]
        with pyro.plate("given", 10, subsample=torch.tensor([4, 2])) as index:
            assert index.tolist() == [4, 2]

    for _ in range(2):
        with minibatch.pinned():
            minibatch(model)()
            minibatch(model)()
    with minibatch.pinned({"rows": torch.arange(5)}):
        minibatch(model)()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert seen[4] == [0, 1, 2, 3, 4]
    assert list(minibatch.plates) == ["rows"]
    minibatch(models.global_latents_in_minibatches)(torch.zeros(3))
    assert len(minibatch.draw("data")) == 2
