"""Ready-made networks by name: encoders, decoders and adversaries, dense or convolutional.

Implementing an architecture: subclass `Architecture`, define ``layers``, ``outputs`` and ``adversary``. Implementing a
posterior: a function with the signature of `Posterior` that joins `POSTERIORS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from implicitvi.avb.adversaries import GatedAdversary, InjectedAdversary, JointAdversary, PairwiseAdversary
from implicitvi.avb.samplers import GatedSampler, NoiseBasisSampler
from implicitvi.errors import OptionError, ShapeError, check_choice, check_size, check_sizes, check_whole
from implicitvi.nn import mlp
from implicitvi.vae.decoders import Decoder, Likelihood, likelihood_of
from implicitvi.vae.encoders import (
    BinaryEncoder,
    ConditionalGaussian,
    DeterministicEncoder,
    FlowEncoder,
    GaussianEncoder,
    ImplicitEncoder,
    InjectedEncoder,
)
from implicitvi.vae.flows import InverseAutoregressiveFlow, PlanarFlow
from implicitvi.vae.model import LatentModel


class Architecture(ABC):
    """A maker of encoders, decoders and adversaries for data of one shape. Each call makes a new network.

    Args:
        x_shape: Shape of one datum; a number for rows of that length.
        basis: Widths of the hidden layers in each network of a noise basis.
        noise: The implicit posterior that suits these networks, a key of `POSTERIORS`.
    """

    def __init__(self, x_shape: int | Sequence[int], *, basis: Sequence[int] = (64, 64), noise: str = "implicit"):
        self.x_shape = check_sizes("x_shape", x_shape if isinstance(x_shape, Sequence) else [x_shape])
        if not self.x_shape:
            raise OptionError.must_be("x_shape", "at least one size", x_shape)
        self.basis, self.noise = check_sizes("basis", basis), noise

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """Return the layers from data ``[B, *x_shape]`` to features, without the activations between them."""

    @abstractmethod
    def outputs(self, z_dim: int, size: int) -> nn.Module:
        """Return a network from codes ``[..., D]`` to the outputs of a decoder ``[..., size]``."""

    @abstractmethod
    def adversary(self, z_dim: int, *, square: bool = False) -> nn.Module:
        """Return ``T(z, x)``: codes ``[S, B, D]`` and data ``[B, *x_shape]`` to scores ``[S, B]``.

        Scores start at 0, or with ``square`` at ``½(‖z‖² - D)``, which suits the prior as contrast.
        """

    def features(self) -> nn.Sequential:
        """Return a network from data ``[B, *x_shape]`` to features ``[B, C]``."""
        return nn.Sequential(*_activated(self.layers(), nn.ELU), nn.Flatten())

    @torch.no_grad()
    def sized_features(self) -> tuple[nn.Sequential, int]:
        """Return `features` and their number ``C``."""
        features = self.features()
        return features, features(torch.zeros(1, *self.x_shape)).shape[-1]

    def encoder(
        self, z_dim: int, posterior: str = "gaussian", *, noise_dim: int | None = None, num_basis: int | None = None
    ) -> nn.Module:
        """Return ``q(z | x)``.

        Args:
            z_dim: Dimension ``D`` of a code.
            posterior: With a density: ``"gaussian"``, the flows ``"iaf"`` and ``"planar"``, and ``"binary"``. With
                draws only: ``"implicit"``, features and noise through one more network; ``"injected"``, noise added
                after every layer; ``"noise_basis"``, whose moments given ``x`` are known; ``"deterministic"``.
            noise_dim: Dimension of the noise, that of each network in a basis; ``None`` for ``2 D``, and at least 8.
            num_basis: Networks of a noise basis; ``None`` for ``D``, and at least 8.
        """
        check_size("z_dim", z_dim)
        check_choice("posterior", posterior, POSTERIORS)
        noisy = ("implicit", "injected", "noise_basis")
        for option, value, kinds in (("noise_dim", noise_dim, noisy), ("num_basis", num_basis, noisy[2:])):
            if value is not None:
                check_whole(option, value)
                if posterior not in kinds:
                    raise OptionError.must_be(f"posterior with {option}", f"one of {kinds}", repr(posterior))
        return POSTERIORS[posterior](self, z_dim, noise_dim or max(8, 2 * z_dim), num_basis or max(8, z_dim))

    def conditional(self, given_dim: int, drawn_dim: int, hidden: Sequence[int] = (64,)) -> ConditionalGaussian:
        """Return a Gaussian over ``[drawn_dim]`` given a datum and ``[given_dim]``, by layers of widths ``hidden``."""
        features, size = self.sized_features()
        return ConditionalGaussian(mlp([given_dim + size, *hidden, 2 * drawn_dim]), features)

    def decoder(self, z_dim: int, likelihood: str | Likelihood = "bernoulli") -> Decoder:
        """Return ``p(x | z)`` for codes ``[..., z_dim]``, by a key of `LIKELIHOODS` or a `Likelihood` of such data."""
        check_size("z_dim", z_dim)
        made = likelihood_of(likelihood, self.x_shape)
        if made.x_shape != self.x_shape:
            raise ShapeError.must_be("x_shape of the likelihood", self.x_shape, tuple(made.x_shape))
        return Decoder(self.outputs(z_dim, made.size), made)


class Dense(Architecture):
    """An architecture of multilayer perceptrons on the entries of a datum in one row.

    Args:
        x_shape: Shape of one datum; a number for rows of that length.
        hidden: Widths of the hidden layers of encoder and adversary, and of the decoder from its end.
        pairing: Network of the adversary: ``"product"`` for an inner product of features of code and datum
            (`PairwiseAdversary`), ``"joint"`` for one network of both (`JointAdversary`).
        product_dim: Length of the vectors of that product; ``None`` for the last width.
        basis: Widths of the hidden layers of each network of a noise basis.

    >>> Dense(4, hidden=(16,)).encoder(2)(torch.zeros(5, 4)).event_shape
    torch.Size([2])
    """

    def __init__(
        self,
        x_shape: int | Sequence[int],
        *,
        hidden: Sequence[int] = (300, 300),
        pairing: str = "product",
        product_dim: int | None = None,
        basis: Sequence[int] = (64, 64),
    ):
        super().__init__(x_shape, basis=basis)
        check_choice("pairing", pairing, ["joint", "product"])
        self.hidden, self.pairing = check_sizes("hidden", hidden), pairing
        if not self.hidden:
            raise OptionError.must_be("hidden", "at least one width", hidden)
        self.product_dim = self.hidden[-1] if product_dim is None else product_dim
        check_whole("product_dim", self.product_dim)

    def layers(self) -> list[nn.Module]:
        first, *rest = (nn.Linear(i, o) for i, o in pairwise([prod(self.x_shape), *self.hidden]))
        return [nn.Sequential(nn.Flatten(), first), *rest]

    def outputs(self, z_dim: int, size: int) -> nn.Module:
        return mlp([z_dim, *reversed(self.hidden), size])

    def adversary(self, z_dim: int, *, square: bool = False) -> nn.Module:
        check_size("z_dim", z_dim)
        trunk = [*_activated(self.layers(), LEAKY)]
        if self.pairing == "joint":
            return JointAdversary(nn.Sequential(*trunk[:-1]), z_dim, width=self.hidden[-1], square=square)
        size = self.product_dim + 1
        x_net = nn.Sequential(*trunk, nn.Linear(self.hidden[-1], size))
        return PairwiseAdversary(x_net, mlp([z_dim, *self.hidden, size], LEAKY), square=square)


class Convolutional(Architecture):
    """An architecture of convolutions over images with values in [0, 1]; the decoder mirrors the encoder.

    Args:
        x_shape: Channels, height and width of one image.
        channels: Channels after each convolution.
        strides: Stride of each; ``None`` for 2 everywhere.
        kernel: Height and width of a kernel, an odd number.
        blocks: Residual blocks before each convolution except the first, in encoder and decoder.
        critic: Architecture of the adversary; ``None`` for these convolutions and an `InjectedAdversary`.
        basis: Widths of the hidden layers of each network of a noise basis.

    >>> Convolutional((1, 7, 9)).decoder(2)(torch.zeros(5, 3, 2)).event_shape
    torch.Size([1, 7, 9])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64),
        strides: Sequence[int] | None = None,
        kernel: int = 3,
        blocks: int = 0,
        critic: Architecture | None = None,
        basis: Sequence[int] = (64, 64),
    ):
        super().__init__(x_shape, basis=basis, noise="injected")
        self.channels = check_sizes("channels", channels)
        self.strides = (2,) * len(self.channels) if strides is None else check_sizes("strides", strides)
        self.kernel, self.blocks, self.critic = kernel, blocks, critic
        if len(self.x_shape) != 3:
            do = "Grey images have one channel; use Dense for rows."
            raise ShapeError.must_be("x_shape of images", "(channels, height, width)", self.x_shape, do)
        if not self.channels or len(self.strides) != len(self.channels):
            got = f"{len(self.channels)} and {len(self.strides)}"
            raise OptionError.must_be("channels and strides", "equally many, one for each convolution", got)
        check_whole("blocks", blocks, 0)
        check_whole("kernel", kernel)
        if kernel % 2 == 0:
            raise OptionError.must_be("kernel size", "odd", kernel)
        if critic is not None and critic.x_shape != self.x_shape:
            raise ShapeError.must_be("x_shape of the critic", self.x_shape, critic.x_shape)

    def layers(self) -> list[nn.Module]:
        sizes = zip([self.x_shape[0], *self.channels[:-1]], self.channels, self.strides, strict=True)
        first, *rest = (nn.Conv2d(i, o, self.kernel, stride, self.kernel // 2) for i, o, stride in sizes)
        later = (nn.Sequential(*self._residual(conv.in_channels), conv) for conv in rest)
        return [nn.Sequential(Centre(), first), *later]

    def outputs(self, z_dim: int, size: int) -> nn.Module:
        _, *sides = self.x_shape
        steps = [sides]
        for stride in self.strides:
            steps.insert(0, [-(-side // stride) for side in steps[0]])
        channels = [*reversed(self.channels), size // prod(sides)]
        net: list[nn.Module] = []
        for k, stride in enumerate(reversed(self.strides)):
            # the output's padding makes up for the size that a stride has rounded
            high, wide = (b - (a - 1) * stride - 1 for a, b in zip(steps[k], steps[k + 1], strict=True))
            before, after = channels[k : k + 2]
            conv = nn.ConvTranspose2d(before, after, self.kernel, stride, self.kernel // 2, (high, wide))
            net += [nn.ELU(), *(self._residual(before) if k else []), conv]
        return Upward(z_dim, [channels[0], *steps[0]], nn.Sequential(*net))

    def adversary(self, z_dim: int, *, square: bool = False) -> nn.Module:
        check_size("z_dim", z_dim)
        if self.critic is not None:
            return self.critic.adversary(z_dim, square=square)
        return InjectedAdversary(self.layers(), z_dim, x_shape=self.x_shape, square=square)

    def _residual(self, channels: int) -> list[nn.Module]:
        return [ResidualConvolution(channels, self.kernel) for _ in range(self.blocks)]


def mnist_networks(width: int = 64) -> Convolutional:
    """Return the networks of the AVB paper for MNIST, images ``[1, 28, 28]``.

    Four convolutions of 5 x 5 pixels, from ``width`` to ``8 width`` channels and down to 7 x 7; a noise basis of three
    layers of ``2 width``; an adversary that is an inner product of ``128 width`` features of data and of codes after
    three layers of ``16 width``. In the paper's code each of its four terms has its own layers; here the two terms of
    the data share theirs, as do the two of the codes, without batch normalisation. The paper's ``width`` is 64.

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, section 5.2 and code.
    """
    check_whole("width", width)
    shape, channels = (1, 28, 28), [width, 2 * width, 4 * width, 8 * width]
    critic = Dense(shape, hidden=(16 * width,) * 3, product_dim=128 * width)
    basis = (2 * width,) * 3
    return Convolutional(shape, channels=channels, strides=(1, 1, 2, 2), kernel=5, critic=critic, basis=basis)


def face_networks(width: int = 64, *, size: int = 64, blocks: int = 1) -> Convolutional:
    """Return the networks of the AVB paper's code for faces, images ``[3, size, size]``.

    Four convolutions of 5 x 5 pixels with stride 2, from ``width`` to ``8 width`` channels, ``blocks`` residual blocks
    between two, and an adversary of the same convolutions with the code added after each, without batch normalisation.
    The paper's ``width`` is 64.

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, supplement and code.
    """
    check_whole("width", width)
    shape, channels = (3, size, size), [width, 2 * width, 4 * width, 8 * width]
    critic = Convolutional(shape, channels=channels, kernel=5)
    return Convolutional(shape, channels=channels, kernel=5, blocks=blocks, critic=critic)


class ReadyMade(LatentModel):
    """A latent variable model whose networks can come from an `Architecture`.

    A subclass takes encoder, decoder and prior, an adversary for each of ``adversaries``, then options by keyword.

    Attributes:
        posterior: Kind of the encoder unless another is asked for; see `Architecture.encoder`.
        likelihood: Likelihood of the decoder unless another is asked for, a key of `LIKELIHOODS`.
        adversaries: The inputs of each adversary: ``"codes"``, or ``"pairs"`` of codes and data.
    """

    posterior: ClassVar[str] = "gaussian"
    likelihood: ClassVar[str] = "bernoulli"
    adversaries: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def build(
        cls,
        networks: Architecture,
        z_dim: int,
        *,
        posterior: str | None = None,
        likelihood: str | Likelihood | None = None,
        prior: Any = None,
        noise_dim: int | None = None,
        num_basis: int | None = None,
        square: bool = False,
        **options: Any,
    ) -> Self:
        """Return a model of ready-made networks.

        Args:
            networks: Maker of encoder, decoder and adversaries.
            z_dim: Dimension ``D`` of a code.
            posterior: Option of `Architecture.encoder`; ``None`` for that of the class.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood`; ``None`` for that of the class.
            prior: As for the class; ``None`` for ``N(0, I)``.
            noise_dim: Option of `Architecture.encoder`.
            num_basis: Option of `Architecture.encoder`.
            square: Where the scores of pairs start; see `Architecture.adversary`.
            options: Other options of the class.
        """
        if not isinstance(networks, Architecture):
            raise OptionError.must_be("networks", "an Architecture, such as Dense(784)", repr(networks))
        encoder = networks.encoder(
            z_dim, cls.posterior if posterior is None else posterior, noise_dim=noise_dim, num_basis=num_basis
        )
        decoder = networks.decoder(z_dim, cls.likelihood if likelihood is None else likelihood)
        kinds = {"codes": lambda: GatedAdversary(z_dim), "pairs": lambda: networks.adversary(z_dim, square=square)}
        adversaries = [kinds[inputs]() for inputs in cls.adversaries]
        return cls(encoder, decoder, z_dim if prior is None else prior, *adversaries, **options)

    @classmethod
    def dense(
        cls, x_dim: int | Sequence[int], z_dim: int, *, hidden: Sequence[int] = (300, 300), **options: Any
    ) -> Self:
        """Return a model of `Dense` networks for rows of a length, or data of a shape; ``options`` as in `build`."""
        return cls.build(Dense(x_dim, hidden=hidden), z_dim, **options)

    @classmethod
    def convolutional(
        cls, x_shape: Sequence[int], z_dim: int, *, channels: Sequence[int] = (32, 64), **options: Any
    ) -> Self:
        """Return a model of `Convolutional` networks, all of stride 2, for small images; ``options`` as in `build`."""
        return cls.build(Convolutional(x_shape, channels=channels), z_dim, **options)

    @classmethod
    def mnist(cls, z_dim: int = 32, *, width: int = 64, **options: Any) -> Self:
        """Return a model of `mnist_networks` for black and white images ``[1, 28, 28]``; ``options`` as in `build`."""
        return cls.build(mnist_networks(width), z_dim, **options)

    @classmethod
    def faces(cls, z_dim: int = 64, *, width: int = 64, size: int = 64, **options: Any) -> Self:
        """Return a model of `face_networks` for ``[3, size, size]``, with likelihood ``"pixels"``; else as `build`."""
        return cls.build(face_networks(width, size=size), z_dim, **{"likelihood": "pixels", **options})


class Centre(nn.Module):
    """A layer that maps values in [0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


class ResidualConvolution(nn.Module):
    """A residual layer ``h + conv(σ(conv(h)))`` of images, the last convolution zero at the start; kernels are odd."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.outer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.outer(nn.functional.elu(self.inner(h)))
        return out


class Upward(nn.Module):
    """A linear layer from codes to small images ``[B, *shape]``, and a network from there to large ones, in one row."""

    def __init__(self, z_dim: int, shape: Sequence[int], network: nn.Module):
        super().__init__()
        self.shape = tuple(shape)
        self.first = nn.Linear(z_dim, prod(shape))
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        """Return the entries of the large images, ``[..., size]``, of codes ``z [..., D]``."""
        lead = z.shape[:-1]
        x: Tensor = self.network(self.first(z.reshape(lead.numel(), z.shape[-1])).unflatten(-1, self.shape))
        return x.reshape(*lead, x.shape[1:].numel())


Posterior = Callable[[Architecture, int, int, int], nn.Module]
LEAKY = partial(nn.LeakyReLU, 0.2)


def _linear(nets: Architecture, outputs: int) -> nn.Module:
    features, size = nets.sized_features()
    return nn.Sequential(features, nn.Linear(size, outputs))


def _flow(nets: Architecture, flow: Callable[[int, int], nn.Module], z_dim: int) -> nn.Module:
    features, size = nets.sized_features()
    return FlowEncoder(features, flow(z_dim, size))


def _implicit(nets: Architecture, z_dim: int, noise_dim: int, _: int) -> nn.Module:
    features, size = nets.sized_features()
    return ImplicitEncoder(GatedSampler(z_dim, noise_dim=noise_dim, context_dim=size, width=128), features)


def _injected(nets: Architecture, z_dim: int, noise_dim: int, _: int) -> nn.Module:
    return InjectedEncoder(nets.layers(), noise_dim=noise_dim, latent_dim=z_dim, x_shape=nets.x_shape)


def _noise_basis(nets: Architecture, z_dim: int, noise_dim: int, num_basis: int) -> nn.Module:
    features, size = nets.sized_features()
    sizes = {"noise_dim": noise_dim, "context_dim": size, "num_basis": num_basis}
    return ImplicitEncoder(NoiseBasisSampler(z_dim, **sizes, hidden=nets.basis, mixing=()), features)


POSTERIORS: dict[str, Posterior] = {
    "gaussian": lambda nets, z_dim, *_: GaussianEncoder(_linear(nets, 2 * z_dim)),
    "iaf": lambda nets, z_dim, *_: _flow(nets, InverseAutoregressiveFlow, z_dim),
    "planar": lambda nets, z_dim, *_: _flow(nets, PlanarFlow, z_dim),
    "binary": lambda nets, z_dim, *_: BinaryEncoder(_linear(nets, z_dim)),
    "implicit": _implicit,
    "injected": _injected,
    "noise_basis": _noise_basis,
    "deterministic": lambda nets, z_dim, *_: DeterministicEncoder(_linear(nets, z_dim)),
}


def _activated(layers: Sequence[nn.Module], activation: Callable[[], nn.Module]) -> list[nn.Module]:
    return [part for layer in layers for part in (layer, activation())]
