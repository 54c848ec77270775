"""The Fréchet distance in the features of a small classifier: closed forms, and images that get worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frechet import FeatureNet, feature_distance, frechet_distance
from implicitvi.errors import OptionError, ShapeError


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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
    with pytest.raises(ShapeError, match="x must be a matrix"):
        frechet_distance(x[:1], x)
    with pytest.raises(OptionError, match="y must be finite, got 20 bad rows"):
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
        with pytest.raises(OptionError, match="integers from 0"):
            FeatureNet(images, bad)
    for option in ("width", "steps", "batch_size", "lr"):
        with pytest.raises(OptionError, match=option):
            FeatureNet(images, labels, **{option: 0})
    with pytest.raises(ShapeError, match=r"must be \[N, 1, 8, 8\]"):
        FeatureNet(images, labels, steps=1).features(images[:, :, :4])
