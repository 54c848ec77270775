"""Decoders: a network of codes ``[..., D]``, then a likelihood that makes a distribution of data from its outputs.

Implementing a likelihood: subclass `Likelihood`, give the number of outputs in ``size``, make the distribution in
``forward``, refuse impossible data by ``limits`` or in ``check``; join `LIKELIHOODS`. Any module from codes to a
distribution will do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import inf, log

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical

from implicitvi.errors import OptionError, check_choice, check_positive, check_sizes
from implicitvi.vae.distributions import Implicit, StraightThroughBernoulli


class Likelihood(nn.Module, ABC):
    """A map from a network's outputs to ``p(x | z)`` for data of one shape.

    Attributes:
        limits: The least and the largest value that data may have.
        name: Its name in errors.
    """

    limits: tuple[float, float] = (-inf, inf)
    name = "this likelihood"

    def __init__(self, x_shape: Sequence[int]):
        super().__init__()
        self.x_shape = torch.Size(check_sizes("x_shape", x_shape))

    @property
    def size(self) -> int:
        """Number of outputs that the network must have."""
        return self.x_shape.numel()

    @abstractmethod
    def forward(self, outputs: Tensor) -> Distribution:
        """Return the distribution of ``outputs [..., size]``: batch shape ``[...]``, event shape ``x_shape``."""

    def check(self, x: Tensor) -> None:
        """Raise `OptionError` for data ``x [N, *x_shape]`` that are impossible under the likelihood."""
        (low, high), (least, most) = (value.item() for value in x.aminmax()), self.limits
        if low < least or high > most:
            got = f"values from {low:g} to {high:g} in {rows_with((x < least) | (x > most))}"
            do = "Divide pixels by 255, or use likelihood='gaussian'."
            raise OptionError.must_be(f"Data of {self.name}", f"between {least:g} and {most:g}", got, do)

    def _independent(self, each: Distribution) -> Distribution:
        return Independent(each, len(self.x_shape) - len(each.event_shape), validate_args=False)


class BernoulliLikelihood(Likelihood):
    """A likelihood of binary data; the outputs are logits. Grey values in [0, 1] are scored by the cross-entropy.

    >>> BernoulliLikelihood([1, 2])(torch.zeros(3, 2)).log_prob(torch.ones(1, 2))
    tensor([-1.3863, -1.3863, -1.3863])
    """

    bernoulli: type[Bernoulli] = Bernoulli
    limits = (0.0, 1.0)
    name = "a Bernoulli likelihood"

    def forward(self, outputs: Tensor) -> Distribution:
        return self._independent(self.bernoulli(logits=outputs.unflatten(-1, self.x_shape), validate_args=False))


class StraightThroughLikelihood(BernoulliLikelihood):
    """A likelihood of binary data whose draws have gradients, for an adversary: `StraightThroughBernoulli`."""

    bernoulli = StraightThroughBernoulli


class GaussianLikelihood(Likelihood):
    """A likelihood of real data; the outputs are means, the scale is learned.

    Args:
        x_shape: Shape of one datum.
        scale: ``"shared"`` for one scale, ``"each"`` for one of every value, learned as parameters; ``"output"`` if
            the network gives it, datum by datum; a number if it is known.
        least: Least scale. Without one, a value that never varies sends the density to infinity.
    """

    log_scale: Tensor
    start = 1.0  # of a scale that is learned

    def __init__(self, x_shape: Sequence[int], *, scale: str | float = "shared", least: float = 1e-3):
        super().__init__(x_shape)
        check_positive("least", least)
        self.from_output = scale == "output"
        self.least = least
        if isinstance(scale, str):
            check_choice("scale", scale, ["shared", "each", "output"])
            start = torch.full(self.x_shape if scale == "each" else (), log(self.start))
            self.log_scale = start if self.from_output else nn.Parameter(start)
        else:
            check_positive("scale", scale)
            self.register_buffer("log_scale", torch.tensor(log(scale)))

    @property
    def size(self) -> int:
        return self.x_shape.numel() * (2 if self.from_output else 1)

    def forward(self, outputs: Tensor) -> Distribution:
        log_scale = self.log_scale
        if self.from_output:
            outputs, log_scale = outputs.chunk(2, -1)
            log_scale = log_scale.unflatten(-1, self.x_shape)
        loc = self._loc(outputs.unflatten(-1, self.x_shape))
        return self._independent(Normal(loc, log_scale.exp().clamp(min=self.least), validate_args=False))

    def _loc(self, outputs: Tensor) -> Tensor:
        return outputs


class PixelLikelihood(GaussianLikelihood):
    """A likelihood of grey or colour values in [0, 1]: a Gaussian whose mean is the logistic function of the outputs.

    Each value has its own scale, learned as in the code of Mescheder et al. (2017) for faces; see `GaussianLikelihood`.
    """

    start = 0.25  # the standard deviation of natural pixels, roughly
    limits = (0.0, 1.0)
    name = "a likelihood of pixels"

    def __init__(self, x_shape: Sequence[int], *, scale: str | float = "each", least: float = 1e-3):
        super().__init__(x_shape, scale=scale, least=least)

    def _loc(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()


class CategoricalLikelihood(Likelihood):
    """A likelihood of one of ``K`` classes at every place, as one-hot data ``[N, ..., K]``; the outputs are logits."""

    def forward(self, outputs: Tensor) -> Distribution:
        return self._independent(OneHotCategorical(logits=outputs.unflatten(-1, self.x_shape), validate_args=False))

    def check(self, x: Tensor) -> None:
        bad = ((x != 0) & (x != 1)).any(-1) | (x.sum(-1) != 1)
        if bad.any():
            do = "torch.nn.functional.one_hot(classes, K).float() makes them."
            what = "Data of a categorical likelihood"
            raise OptionError.must_be(what, "one-hot along the last axis", f"others in {rows_with(bad)}", do)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "straight_through": StraightThroughLikelihood,
    "gaussian": GaussianLikelihood,
    "pixels": PixelLikelihood,
    "categorical": CategoricalLikelihood,
}


def rows_with(bad: Tensor) -> str:
    """Return how many rows of a mask ``bad [N, ...]`` have a true entry, and the first of them, as words."""
    rows = bad.reshape(len(bad), -1).any(1)
    return f"{int(rows.sum())} of {len(rows)} rows (first: {int(rows.int().argmax())})"


def likelihood_of(name: str | Likelihood, x_shape: Sequence[int]) -> Likelihood:
    """Return a likelihood by its name, or the given one unchanged."""
    if isinstance(name, Likelihood):
        return name
    check_choice("likelihood", name, LIKELIHOODS)
    return LIKELIHOODS[name](x_shape)


class Decoder(nn.Module):
    """A decoder ``p(x | z)`` with a density: a network, then a likelihood.

    Args:
        network: Codes ``[..., D]`` to outputs ``[..., size]``.
        likelihood: Outputs to a distribution of data.

    >>> decoder = Decoder(nn.Linear(2, 4), BernoulliLikelihood([4]))
    >>> decoder(torch.zeros(5, 3, 2)).log_prob(torch.ones(3, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, likelihood: Likelihood):
        super().__init__()
        self.network, self.likelihood = network, likelihood

    def forward(self, z: Tensor) -> Distribution:
        p: Distribution = self.likelihood(self.network(z))
        return p

    @property
    def limits(self) -> tuple[float, float] | None:
        """The least and the largest value that data may have; ``None`` if the likelihood has a check of its own."""
        return self.likelihood.limits if type(self.likelihood).check is Likelihood.check else None

    def check(self, x: Tensor) -> None:
        """Raise `OptionError` for data ``x [N, *x_shape]`` that are impossible under the likelihood."""
        self.likelihood.check(x)


class ImplicitDecoder(nn.Module):
    """A decoder without a density: ``x = f(z, ε)`` for Gaussian noise ``ε``.

    Args:
        network: Code and noise in one row, ``[..., D + noise_dim]``, to a datum ``[..., *x_shape]`` or its entries.
        x_shape: Shape of one datum.
        noise_dim: Dimension of the noise; 0 for a deterministic decoder.
    """

    def __init__(self, network: nn.Module, x_shape: Sequence[int], *, noise_dim: int = 0):
        super().__init__()
        self.network, self.noise_dim = network, noise_dim
        self.x_shape = torch.Size(x_shape)

    def forward(self, z: Tensor) -> Distribution:
        def draw(shape: torch.Size) -> Tensor:
            lead = shape + z.shape[:-1]
            noise = torch.randn(*lead, self.noise_dim, dtype=z.dtype, device=z.device)
            x: Tensor = self.network(torch.cat([z.expand(*lead, -1), noise], -1))
            return x.reshape(lead + self.x_shape)

        return Implicit(draw, z.shape[:-1], self.x_shape)
