"""What codes and features tell: closed forms, and what each figure is there to see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli

from implicitvi.errors import OptionError, ShapeError
from implicitvi.metrics.frechet import FeatureNet, feature_distance, frechet_distance
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
    with pytest.raises(ShapeError, match="do not match"):
        squared_error(x, x[:, :1])
    p = torch.tensor([[0.25, 0.5], [0.5, 1.0]])
    log_likelihood = Bernoulli(p).log_prob(x).sum(-1)
    by_hand = -(math.log(0.75) + 2 * math.log(0.5)) / 4
    assert negative_log_likelihood(log_likelihood, entries=2) == pytest.approx(by_hand)
    with pytest.raises(OptionError, match="entries"):
        negative_log_likelihood(log_likelihood, entries=0)


# Fréchet distance


def with_moments(rows: int, mean: Tensor, factor: Tensor, seed: int = 0) -> Tensor:
    """Draws ``[rows, D]`` whose sample mean and covariance are exactly ``mean`` and ``factor factorᵀ``."""
    draws = normals(rows, len(mean), seed=seed)
    draws = draws - draws.mean(0)
    draws = draws @ torch.linalg.inv(torch.linalg.cholesky(draws.mT.cov())).mT
    return mean + draws @ factor.mT


def test_equal_sets_have_no_distance() -> None:
    for x in (normals(50, 5), normals(5, 50), 1e6 + normals(50, 5).float(), torch.zeros(3, 2)):
        scale = float(x.double().var(0).sum())
        assert frechet_distance(x, x.flip(0)) <= 1e-12 * scale


def test_commuting_gaussians_have_the_known_distance() -> None:
    mean, sd = torch.tensor([1.0, 2.0, -2.0]).double(), torch.tensor([0.5, 2.0, 3.0]).double()
    turn = torch.linalg.qr(normals(3, 3, seed=5)).Q
    x = with_moments(40, torch.zeros(3).double(), turn)
    y = with_moments(60, mean, turn * sd, seed=1)
    exact = 9 + float((sd - 1).square().sum())
    assert frechet_distance(x, y) == pytest.approx(exact, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(exact, rel=1e-10)


def test_any_gaussians_have_the_distance_by_the_root_of_a_matrix() -> None:
    a, b = normals(4, 4, seed=3), normals(4, 4, seed=4)
    x = with_moments(40, torch.zeros(4).double(), a)
    y = with_moments(50, torch.ones(4).double(), b, seed=1)
    product = torch.linalg.eigvals(a @ a.mT @ b @ b.mT).real
    exact = 4 + a.square().sum() + b.square().sum() - 2 * product.sqrt().sum()
    assert frechet_distance(x, y) == pytest.approx(float(exact), rel=1e-10)
    without_root = 4 + (a.square().sum().sqrt() - b.square().sum().sqrt()) ** 2
    assert abs(frechet_distance(x, y) - float(without_root)) > 0.1


def test_bad_features_are_refused() -> None:
    x = normals(20, 3)
    with pytest.raises(ShapeError, match="got 3 and 2 dimensions"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ShapeError, match="x has to be a matrix"):
        frechet_distance(x[:1], x)
    with pytest.raises(OptionError, match="y has features that are not finite; got 20 such rows"):
        frechet_distance(x, x / 0)


# features of a classifier


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def net(digits: tuple[Tensor, Tensor]) -> FeatureNet:
    images, labels = digits
    return FeatureNet(images[:1000], labels[:1000], steps=400)


def test_the_classifier_has_learned_digits(net: FeatureNet, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    assert net.accuracy(images[1000:], labels[1000:]) > 0.88  # other writers; 0.93 at this seed
    assert net.features(images[:7]).shape == (7, 64)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    together, apart = net.features(images), net.features(images, batch_size=100)
    assert torch.allclose(together, apart, atol=1e-4)


def test_distance_grows_with_what_is_done_to_the_images(net: FeatureNet, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits[0][1000:1398], digits[0][1398:1796]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    mixed = [feature_distance(net, (1 - share) * x + share * noise, y) for share in (0, 0.3, 0.6, 1)]
    assert mixed == sorted(mixed) and mixed[-1] > 5 * mixed[0]
    one_class = digits[0][digits[1] == 3]
    assert feature_distance(net, one_class, y) > 3 * mixed[0]  # a mode is all there is
    assert feature_distance(net, x, x) < 1e-6 * mixed[0]


def test_the_network_is_a_function_of_data_and_seed(digits: tuple[Tensor, Tensor]) -> None:
    x, labels = digits[0][:200].flatten(1), digits[1][:200]
    state = torch.get_rng_state()
    nets = [FeatureNet(x, labels, steps=20, width=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    once, again, other = (net.features(x) for net in nets)
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_images_and_labels_that_do_not_suit_are_refused(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:50], digits[1][:50]
    with pytest.raises(ShapeError, match="need one: x"):
        FeatureNet(images[:, 0], labels)
    with pytest.raises(ShapeError, match="one label for each"):
        FeatureNet(images, labels[:40])
    for bad in (labels.float(), labels - 5):
        with pytest.raises(OptionError, match="no classes"):
            FeatureNet(images, bad)
    for option in ("width", "steps", "batch_size", "lr"):
        with pytest.raises(OptionError, match=option):
            FeatureNet(images, labels, **{option: 0})
    with pytest.raises(ShapeError, match=r"expected \[N, 1, 8, 8\]"):
        FeatureNet(images, labels, steps=1).features(images[:, :, :4])
