"""Metrics of codes: closed forms, and the errors that each metric must show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli

from implicitvi.errors import OptionError, ShapeError
from implicitvi.metrics.latent import active_units, aggregated_kl, negative_log_likelihood, squared_error


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# codes


def test_the_aggregated_posterior_of_an_exact_model_is_the_prior() -> None:
    """``m ~ N(0, 0.9)``, ``z ~ N(m, 0.1)``, and codes that shrink or leave a hole; noise of the estimate 0.02."""
    means, noise, prior = (0.9**0.5 * normals(3000, 2), normals(3000, 2, seed=1), normals(3000, 2, seed=2))
    assert abs(aggregated_kl(means + 0.1**0.5 * noise, prior)) < 0.1
    narrow = aggregated_kl(0.5 * (means + 0.1**0.5 * noise), prior)
    assert abs(narrow - (2 * math.log(2) - 0.75)) < 0.1
    with_hole = means[means.norm(dim=1) > 1]
    assert aggregated_kl(with_hole, prior) > 0.2


def test_several_draws_of_each_datum_are_one_set() -> None:
    codes, prior = normals(5, 100, 2), normals(400, 2, seed=1)
    assert aggregated_kl(codes, prior) == aggregated_kl(codes.reshape(500, 2), prior)


def test_codes_of_an_encoder_without_noise_are_refused_where_they_repeat() -> None:
    with pytest.raises(OptionError, match="repeated"):
        aggregated_kl(normals(4, 2).repeat(100, 1), normals(400, 2, seed=1))


def test_active_units_are_those_whose_mean_varies() -> None:
    means = normals(5000, 4) * torch.tensor([1.0, 0.11, 0.09, 0.0]) + 3
    assert active_units(means).tolist() == [True, True, False, False]
    assert active_units(means, threshold=0.005).sum() == 3
    with pytest.raises(OptionError, match="threshold"):
        active_units(means, threshold=0.0)
    for bad in (means[:1], means[0]):
        with pytest.raises(ShapeError, match="posterior means"):
            active_units(bad)


def test_reconstruction_errors_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert squared_error(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]])) == 0.25
    assert squared_error(x, torch.stack([x, x + 2])) == 2.0
    with pytest.raises(ShapeError, match="Data and reconstructions must be"):
        squared_error(x, x[:, :1])
    p = torch.tensor([[0.25, 0.5], [0.5, 1.0]])
    log_likelihood = Bernoulli(p).log_prob(x).sum(-1)
    by_hand = -(math.log(0.75) + 2 * math.log(0.5)) / 4
    assert negative_log_likelihood(log_likelihood, entries=2) == pytest.approx(by_hand)
    with pytest.raises(OptionError, match="entries"):
        negative_log_likelihood(log_likelihood, entries=0)
