"""Networks that fit together, by name: the arrows and adversaries of a model, dense or convolutional.

An `Architecture` makes encoders, decoders and adversaries for data of one shape. A system that says in ``assemble``
which of them it is made of has the constructors of `ReadyMade`: ``dense``, ``convolutional``, ``mnist``, ``faces``.

Implementing an architecture: subclass `Architecture`, define ``layers``, ``outputs`` and ``adversary``. Implementing a
posterior: a function with the signature of `Posterior` that joins `POSTERIORS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from implicitvi.avb.adversaries import InjectedAdversary, JointAdversary, PairwiseAdversary
from implicitvi.avb.samplers import GatedSampler, NoiseBasisSampler
from implicitvi.errors import OptionError, ShapeError, check_at_least, check_choice
from implicitvi.nn import mlp
from implicitvi.vae.decoders import Decoder, Likelihood, likelihood_of
from implicitvi.vae.encoders import (
    BinaryEncoder,
    DeterministicEncoder,
    FlowEncoder,
    GaussianEncoder,
    ImplicitEncoder,
    InjectedEncoder,
)
from implicitvi.vae.flows import InverseAutoregressiveFlow, PlanarFlow


class Architecture(ABC):
    """Encoders, decoders and adversaries for data of one shape. Each call makes a new network.

    Args:
        x_shape: Shape of one datum; a number for rows of that length.
        basis: Widths of the hidden layers of each network of a noise basis.
        noise: The implicit posterior that suits these networks, a key of `POSTERIORS`.
    """

    def __init__(self, x_shape: int | Sequence[int], *, basis: Sequence[int] = (64, 64), noise: str = "implicit"):
        self.x_shape = (x_shape,) if isinstance(x_shape, int) else tuple(x_shape)
        for size in self.x_shape:
            check_at_least("x_shape", size, 1)
        self.basis = tuple(basis)
        self.noise = noise

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """Layers from data ``[B, *x_shape]`` to features, without the activations between them."""

    @abstractmethod
    def outputs(self, z_dim: int, size: int) -> nn.Module:
        """A network from codes ``[..., D]`` to the outputs of a decoder ``[..., size]``."""

    @abstractmethod
    def adversary(self, z_dim: int, *, square: bool = False) -> nn.Module:
        """``T(z, x)``: codes ``[S, B, D]`` and data ``[B, *x_shape]`` to scores ``[S, B]``.

        Args:
            z_dim: Dimension ``D`` of a code.
            square: Whether scores start at ``½(‖z‖² - D)``, which suits the prior as contrast, or at 0.
        """

    def features(self) -> nn.Sequential:
        """A network from data ``[B, *x_shape]`` to features ``[B, C]``."""
        return nn.Sequential(*_activated(self.layers(), nn.ELU), nn.Flatten())

    def encoder(
        self, z_dim: int, posterior: str = "gaussian", *, noise_dim: int | None = None, num_basis: int | None = None
    ) -> nn.Module:
        """``q(z | x)``.

        Args:
            z_dim: Dimension ``D`` of a code.
            posterior: With a density: ``"gaussian"``, the flows ``"iaf"`` and ``"planar"``, and ``"binary"``. With
                draws only: ``"implicit"``, features and noise through one more network; ``"injected"``, noise added
                after every layer; ``"noise_basis"``, whose moments given ``x`` are known; ``"deterministic"``.
            noise_dim: Dimension of the noise, or of that of each network of a basis; ``None`` for ``2 D``, and at
                least 8.
            num_basis: Networks of a noise basis; ``None`` for ``D``, and at least 8.
        """
        check_at_least("z_dim", z_dim, 1)
        check_choice("posterior", posterior, POSTERIORS)
        for option, value, users in (
            ("noise_dim", noise_dim, ("implicit", "injected", "noise_basis")),
            ("num_basis", num_basis, ("noise_basis",)),
        ):
            if value is not None:
                check_at_least(option, value, 1)
                if posterior not in users:
                    raise OptionError(
                        f"{option} means nothing to this posterior",
                        got=repr(posterior),
                        expected=f"one of {', '.join(map(repr, users))}",
                    )
        return POSTERIORS[posterior](self, z_dim, noise_dim or max(8, 2 * z_dim), num_basis or max(8, z_dim))

    def decoder(self, z_dim: int, likelihood: str | Likelihood = "bernoulli") -> Decoder:
        """``p(x | z)``.

        Args:
            z_dim: Dimension ``D`` of a code.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood` of data of this shape.
        """
        check_at_least("z_dim", z_dim, 1)
        made = likelihood_of(likelihood, self.x_shape)
        if made.x_shape != self.x_shape:
            raise ShapeError(
                "the likelihood is of data of another shape", got=tuple(made.x_shape), expected=self.x_shape
            )
        return Decoder(self.outputs(z_dim, made.size), made)

    def arrows(
        self, z_dim: int, posterior: str, likelihood: str | Likelihood, prior: Any, **noise: int | None
    ) -> tuple[nn.Module, nn.Module, Any]:
        """Encoder, decoder and prior of a system: `encoder`, `decoder`, and ``N(0, I)`` where the prior is ``None``."""
        encoder = self.encoder(z_dim, posterior, **noise)
        return encoder, self.decoder(z_dim, likelihood), z_dim if prior is None else prior


class Dense(Architecture):
    """Multilayer perceptrons on the entries of a datum in one row.

    Args:
        x_shape: Shape of one datum; a number for rows of that length.
        hidden: Widths of the hidden layers of encoder and adversary, and of the decoder from its end.
        pairing: How the adversary looks at code and datum: ``"product"`` for each by itself before an inner product
            (`PairwiseAdversary`), ``"joint"`` for both together (`JointAdversary`).
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
        if not hidden:
            raise OptionError("there are no hidden layers", expected="at least one width")
        for width in hidden:
            check_at_least("hidden", width, 1)
        check_choice("pairing", pairing, ["joint", "product"])
        self.hidden = tuple(hidden)
        self.pairing = pairing
        self.product_dim = hidden[-1] if product_dim is None else product_dim
        check_at_least("product_dim", self.product_dim, 1)

    def layers(self) -> list[nn.Module]:
        first, *rest = (nn.Linear(i, o) for i, o in pairwise([prod(self.x_shape), *self.hidden]))
        return [nn.Sequential(nn.Flatten(), first), *rest]

    def outputs(self, z_dim: int, size: int) -> nn.Module:
        return mlp([z_dim, *reversed(self.hidden), size])

    def adversary(self, z_dim: int, *, square: bool = False) -> nn.Module:
        check_at_least("z_dim", z_dim, 1)
        trunk = [*_activated(self.layers(), LEAKY)]
        if self.pairing == "joint":
            return JointAdversary(nn.Sequential(*trunk[:-1]), z_dim, width=self.hidden[-1], square=square)
        size = self.product_dim + 1
        x_net = nn.Sequential(*trunk, nn.Linear(self.hidden[-1], size))
        return PairwiseAdversary(x_net, mlp([z_dim, *self.hidden, size], LEAKY), square=square)


class Convolutional(Architecture):
    """Convolutions over images with values in [0, 1]; the decoder is the mirror image of the encoder.

    Args:
        x_shape: Channels, height and width of one image.
        channels: Channels after each convolution.
        strides: Stride of each; ``None`` for 2 everywhere.
        kernel: Height and width of a kernel, an odd number.
        blocks: Residual blocks before each convolution but the first, and before each of the decoder but its first.
        critic: Networks whose adversary is used in place of these convolutions with the code added after each
            (`InjectedAdversary`).
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
        self.channels = tuple(channels)
        self.strides = (2,) * len(self.channels) if strides is None else tuple(strides)
        self.kernel = kernel
        self.blocks = blocks
        self.critic = critic
        if len(self.x_shape) != 3:
            raise ShapeError(
                "convolutions need images",
                got=f"x_shape {self.x_shape}",
                expected="(channels, height, width)",
                do="Grey images have one channel; for rows take Dense.",
            )
        if not self.channels or len(self.strides) != len(self.channels):
            raise OptionError(
                "channels and strides do not fit",
                got=f"{len(self.channels)} and {len(self.strides)} of them",
                expected="one of each for every convolution",
            )
        for name, sizes in (("channels", self.channels), ("strides", self.strides)):
            for size in sizes:
                check_at_least(name, size, 1)
        check_at_least("blocks", blocks, 0)
        if kernel < 1 or kernel % 2 == 0:
            raise OptionError("the kernel has no middle", got=kernel, expected="an odd number")
        if critic is not None and critic.x_shape != self.x_shape:
            raise ShapeError("the critic is for data of another shape", got=critic.x_shape, expected=self.x_shape)

    def layers(self) -> list[nn.Module]:
        sizes = pairwise([self.x_shape[0], *self.channels])
        convolutions = [
            nn.Conv2d(i, o, self.kernel, stride, padding=self.kernel // 2)
            for (i, o), stride in zip(sizes, self.strides, strict=True)
        ]
        first, *rest = convolutions
        return [
            nn.Sequential(Centre(), first),
            *(nn.Sequential(*self._residual(conv.in_channels), conv) for conv in rest),
        ]

    def outputs(self, z_dim: int, size: int) -> nn.Module:
        _, *sides = self.x_shape
        steps = [sides]
        for stride in self.strides:
            steps.insert(0, [-(-side // stride) for side in steps[0]])
        channels = [*reversed(self.channels), size // prod(sides)]
        net: list[nn.Module] = []
        for k, stride in enumerate(reversed(self.strides)):
            # what a stride has rounded up is given back by the padding
            padding = [b - (a - 1) * stride - 1 for a, b in zip(steps[k], steps[k + 1], strict=True)]
            conv = nn.ConvTranspose2d(
                channels[k],
                channels[k + 1],
                self.kernel,
                stride,
                padding=self.kernel // 2,
                output_padding=(padding[0], padding[1]),
            )
            net += [nn.ELU(), *(self._residual(channels[k]) if k else []), conv]
        return Upward(z_dim, [channels[0], *steps[0]], nn.Sequential(*net))

    def adversary(self, z_dim: int, *, square: bool = False) -> nn.Module:
        check_at_least("z_dim", z_dim, 1)
        if self.critic is not None:
            return self.critic.adversary(z_dim, square=square)
        return InjectedAdversary(self.layers(), z_dim, x_shape=self.x_shape, square=square)

    def _residual(self, channels: int) -> list[nn.Module]:
        return [ResidualConvolution(channels, self.kernel) for _ in range(self.blocks)]


def mnist_networks(width: int = 64) -> Convolutional:
    """The networks for MNIST of the AVB paper, images ``[1, 28, 28]``.

    Four convolutions of 5 x 5 pixels, from ``width`` to ``8 width`` channels and down to 7 x 7; a noise basis of three
    layers of ``2 width``; an adversary that is an inner product of ``128 width`` features of data and of codes after
    three layers of ``16 width``. In the paper's code each of its four terms has layers of its own, here the two of
    the data share them and so do the two of the codes; there is no batch normalisation.

    Args:
        width: 64 for the paper's; less for smaller networks.

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, section 5.2 and code.
    """
    check_at_least("width", width, 1)
    shape = (1, 28, 28)
    return Convolutional(
        shape,
        channels=[width, 2 * width, 4 * width, 8 * width],
        strides=(1, 1, 2, 2),
        kernel=5,
        critic=Dense(shape, hidden=(16 * width,) * 3, product_dim=128 * width),
        basis=(2 * width,) * 3,
    )


def face_networks(width: int = 64, *, size: int = 64, blocks: int = 1) -> Convolutional:
    """The networks for faces of the AVB paper's code, images ``[3, size, size]``.

    Four convolutions of 5 x 5 pixels with stride 2, from ``width`` to ``8 width`` channels, residual blocks between,
    and an adversary of the same convolutions with the code added after each, without batch normalisation.

    Args:
        width: 64 for the paper's; less for smaller networks.
        size: Height and width of an image.
        blocks: Residual blocks between two convolutions.

    References:
        Adversarial Variational Bayes, Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017, supplement and code.
    """
    check_at_least("width", width, 1)
    channels = [width, 2 * width, 4 * width, 8 * width]
    shape = (3, size, size)
    critic = Convolutional(shape, channels=channels, kernel=5)
    return Convolutional(shape, channels=channels, kernel=5, blocks=blocks, critic=critic)


class ReadyMade(ABC):
    """Constructors of a system whose networks come from an `Architecture`."""

    @classmethod
    @abstractmethod
    def assemble(cls, *args: Any, **kwargs: Any) -> Self:
        """The system, of ``networks`` for codes of dimension ``z_dim``, and with options of its own."""

    @classmethod
    def dense(
        cls, x_dim: int | Sequence[int], z_dim: int, *, hidden: Sequence[int] = (300, 300), **options: Any
    ) -> Self:
        """The system of multilayer perceptrons.

        Args:
            x_dim: Length of a row, or shape of one datum.
            z_dim: Dimension ``D`` of a code.
            hidden: Widths of the hidden layers.
            options: As for ``assemble``.
        """
        return cls.assemble(Dense(x_dim, hidden=hidden), z_dim, **options)

    @classmethod
    def convolutional(
        cls, x_shape: Sequence[int], z_dim: int, *, channels: Sequence[int] = (32, 64), **options: Any
    ) -> Self:
        """The system of convolutions, for small images with values in [0, 1].

        Args:
            x_shape: Channels, height and width of one image.
            z_dim: Dimension ``D`` of a code.
            channels: Channels after each convolution, every one of which halves height and width.
            options: As for ``assemble``.
        """
        return cls.assemble(Convolutional(x_shape, channels=channels), z_dim, **options)

    @classmethod
    def mnist(cls, z_dim: int = 32, *, width: int = 64, **options: Any) -> Self:
        """The system of `mnist_networks`, for images ``[1, 28, 28]`` in black and white.

        Args:
            z_dim: Dimension ``D`` of a code.
            width: Channels of the first convolution.
            options: As for ``assemble``.
        """
        return cls.assemble(mnist_networks(width), z_dim, **options)

    @classmethod
    def faces(
        cls,
        z_dim: int = 64,
        *,
        width: int = 64,
        size: int = 64,
        likelihood: str | Likelihood = "pixels",
        **options: Any,
    ) -> Self:
        """The system of `face_networks`, for colour images ``[3, size, size]``.

        Args:
            z_dim: Dimension ``D`` of a code.
            width: Channels of the first convolution.
            size: Height and width of an image.
            likelihood: A key of `LIKELIHOODS`, or a `Likelihood`.
            options: As for ``assemble``.
        """
        networks = face_networks(width, size=size)
        return cls.assemble(networks, z_dim, likelihood=likelihood, **options)


class Centre(nn.Module):
    """Values in [0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` to the same shape."""
        return 2 * x - 1


class ResidualConvolution(nn.Module):
    """``h + conv(σ(conv(h)))``, the last convolution zero at the start.

    Args:
        channels: Channels of input and output.
        kernel: Height and width of the kernels, an odd number.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.outer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        """``[B, channels, height, width]`` to the same shape."""
        out: Tensor = h + self.outer(nn.functional.elu(self.inner(h)))
        return out


class Upward(nn.Module):
    """A linear layer to a small image of many channels, and a network from there to a large one, entry by entry.

    Args:
        z_dim: Dimension ``D`` of a code.
        shape: Channels, height and width of the small image.
        network: Small images ``[B, *shape]`` to large ones.
    """

    def __init__(self, z_dim: int, shape: Sequence[int], network: nn.Module):
        super().__init__()
        self.shape = tuple(shape)
        self.first = nn.Linear(z_dim, prod(shape))
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        """Codes ``[..., D]`` to the entries of an image in one row ``[..., size]``."""
        lead = z.shape[:-1]
        h = self.first(z.reshape(lead.numel(), z.shape[-1])).unflatten(-1, self.shape)
        x: Tensor = self.network(h)
        return x.reshape(*lead, x.shape[1:].numel())


Posterior = Callable[[Architecture, int, int, int], nn.Module]
LEAKY = partial(nn.LeakyReLU, 0.2)


def _gaussian(nets: Architecture, z_dim: int, *_: int) -> nn.Module:
    return GaussianEncoder(_then_linear(nets, 2 * z_dim))


def _deterministic(nets: Architecture, z_dim: int, *_: int) -> nn.Module:
    return DeterministicEncoder(_then_linear(nets, z_dim))


def _binary(nets: Architecture, z_dim: int, *_: int) -> nn.Module:
    return BinaryEncoder(_then_linear(nets, z_dim))


def _iaf(nets: Architecture, z_dim: int, *_: int) -> nn.Module:
    features = nets.features()
    return FlowEncoder(features, InverseAutoregressiveFlow(z_dim, size_of(nets, features)))


def _planar(nets: Architecture, z_dim: int, *_: int) -> nn.Module:
    features = nets.features()
    return FlowEncoder(features, PlanarFlow(z_dim, size_of(nets, features)))


def _implicit(nets: Architecture, z_dim: int, noise_dim: int, _: int) -> nn.Module:
    features = nets.features()
    sampler = GatedSampler(z_dim, noise_dim=noise_dim, context_dim=size_of(nets, features), width=128)
    return ImplicitEncoder(sampler, features)


def _injected(nets: Architecture, z_dim: int, noise_dim: int, _: int) -> nn.Module:
    return InjectedEncoder(nets.layers(), noise_dim=noise_dim, latent_dim=z_dim, x_shape=nets.x_shape)


def _noise_basis(nets: Architecture, z_dim: int, noise_dim: int, num_basis: int) -> nn.Module:
    features = nets.features()
    sampler = NoiseBasisSampler(
        z_dim,
        noise_dim=noise_dim,
        context_dim=size_of(nets, features),
        num_basis=num_basis,
        hidden=nets.basis,
        mixing=(),
    )
    return ImplicitEncoder(sampler, features)


POSTERIORS: dict[str, Posterior] = {
    "gaussian": _gaussian,
    "iaf": _iaf,
    "planar": _planar,
    "binary": _binary,
    "implicit": _implicit,
    "injected": _injected,
    "noise_basis": _noise_basis,
    "deterministic": _deterministic,
}


def _activated(layers: Sequence[nn.Module], activation: Callable[[], nn.Module]) -> list[nn.Module]:
    """Layers, each with an activation behind it."""
    return [part for layer in layers for part in (layer, activation())]


def _then_linear(nets: Architecture, outputs: int) -> nn.Module:
    features = nets.features()
    return nn.Sequential(features, nn.Linear(size_of(nets, features), outputs))


@torch.no_grad()
def size_of(nets: Architecture, features: nn.Module) -> int:
    """How many features there are."""
    return int(features(torch.zeros(1, *nets.x_shape)).shape[-1])
