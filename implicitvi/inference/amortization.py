"""Amortized posteriors: one network for the latents of every datum, or of every dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from implicitvi.avb.conditional import ConditionalSampler
from implicitvi.avb.samplers import Sampler
from implicitvi.errors import ModelError, OptionError, ShapeError
from implicitvi.nn import LocationScaleNet
from implicitvi.pyro_model.plates import PlateRun

Features = Callable[..., Tensor]
Amortize = str | Mapping[str, Features] | Features


@dataclass(frozen=True)
class Amortization:
    """What a guide is amortized over.

    Attributes:
        plate: The plate whose elements have latents of their own; ``None`` for whole datasets.
        features: What the network is shown, a function of the model's arguments; ``None`` for everything that the
            model observes in the plate.
    """

    plate: str | None
    features: Features | None

    @classmethod
    def parse(cls, amortize: Amortize) -> Amortization:
        """Read the option ``amortize`` of `ImplicitGuide`."""
        if isinstance(amortize, str):
            return cls(amortize, None)
        if isinstance(amortize, Mapping):
            if len(amortize) != 1:
                raise OptionError("a guide can be amortized over one plate", got=sorted(amortize) or "none")
            ((plate, features),) = amortize.items()
            if isinstance(plate, str) and callable(features):
                return cls(plate, features)
        elif callable(amortize):
            return cls(None, amortize)
        raise OptionError(
            "amortize is neither a plate nor a function",
            got=repr(amortize),
            expected="the name of a plate, {plate: features} or features",
            do="features takes the model's arguments and returns a tensor: a row for each element of the plate, or "
            "one vector for a dataset.",
        )

    def rows(self, run: PlateRun, *args: Any, **kwargs: Any) -> Tensor:
        """Features of the elements of a plate, of all ``N`` or of those in the run: ``[N or B, C]``.

        Raises:
            ShapeError: The function of the features returns neither.
        """
        layout = run.layout
        if self.features is None:
            if run.observed is None:
                raise ModelError(
                    f"plate {self.plate!r} observes nothing that could be shown to the network",
                    do="Pass amortize={plate: features} with a function of the model's arguments.",
                    faq="a-latent-for-every-row",
                )
            return run.observed
        rows = self.features(*args, **kwargs)
        if not isinstance(rows, Tensor) or not rows.dim() or len(rows) not in {layout.size, layout.full_size}:
            raise ShapeError(
                f"the features of plate {self.plate!r} do not have a row for each element",
                got=f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__,
                expected=f"[{layout.full_size}, ...]"
                + (f" or [{layout.size}, ...]" if layout.size != layout.full_size else ""),
                faq="a-latent-for-every-row",
            )
        return rows.flatten(1) if rows.dim() > 1 else rows[:, None]

    def row(self, *args: Any, **kwargs: Any) -> Tensor:
        """Features of one dataset, ``[1, C]``."""
        assert self.features is not None
        row = self.features(*args, **kwargs)
        if not isinstance(row, Tensor):
            raise ShapeError("the features of a dataset are not a tensor", got=type(row).__name__, expected="a tensor")
        return row.reshape(1, -1)


class AmortizedSampler(nn.Module):
    """Draws shared latents ``g``, then those of every datum given its features and ``g``.

        g = f(ε),   z_i = m(x_i, g) + L(x_i, g) h(ε_i, x_i, g)

    Args:
        shared: Sampler of the shared latents, ``None`` where there are none.
        make_local: Function of latent dimension and ``context_dim`` that returns the sampler of one datum.
        datum_dim: Latent dimension ``D`` of a datum.
        feature_dim: Dimension ``C`` of its features.
    """

    feature_loc: Tensor
    feature_scale: Tensor

    def __init__(self, shared: Sampler | None, make_local: Callable[..., Sampler], *, datum_dim: int, feature_dim: int):
        super().__init__()
        self.shared = shared
        context_dim = feature_dim + (0 if shared is None else shared.latent_dim)
        inner = make_local(datum_dim, context_dim=context_dim)
        self.local = ConditionalSampler(inner, LocationScaleNet(context_dim, datum_dim))
        self.register_buffer("feature_loc", torch.zeros(feature_dim))
        self.register_buffer("feature_scale", torch.ones(feature_dim))

    def set_units(self, rows: Tensor) -> None:
        """Take the units of the features from typical ones, ``[N, C]``."""
        check_finite(rows)
        rows = rows.to(self.feature_loc)
        scale = rows.std(0, correction=0)
        self.feature_loc.copy_(rows.mean(0))
        self.feature_scale.copy_(torch.where(scale > 0, scale, 1.0))

    def context(self, rows: Tensor, g: Tensor | None, frame: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the local network is shown: ``[B, C]``, or ``[S, B, C + G]`` beside shared draws ``g [S, G]``.

        The shared draws are shown in units of ``frame``, by default their sampler's location and scale.
        """
        if rows.shape[1:] != self.feature_loc.shape:
            raise ShapeError(
                "the features are not those that the guide was made with",
                got=f"[{', '.join(map(str, rows.shape))}]",
                expected=f"[B, {len(self.feature_loc)}]",
            )
        x = (rows.to(self.feature_loc) - self.feature_loc) / self.feature_scale
        if g is None or self.shared is None:
            return x
        loc, scale_tril = frame or (self.shared.loc, self.shared.scale_tril)
        whitened = (g - loc) / scale_tril.diagonal()
        shape = (len(g), len(x), -1)
        return torch.cat([x.expand(*shape), whitened[:, None].expand(*shape)], -1)

    def forward(self, num_samples: int, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """Draw ``g [S, G]``, ``None`` where nothing is shared, and ``z [S, B, D]`` for features ``[B, C]``."""
        g = None if self.shared is None else self.shared(num_samples)
        z: Tensor = self.local(num_samples, self.context(rows, g))
        return g, z


def check_finite(rows: Tensor) -> None:
    """Raise `ModelError` unless features ``[N, C]`` are finite: of others a network makes draws that are not either.

    Not for every step: the host would wait for the device.
    """
    bad = (~rows.isfinite()).any(1)
    if bad.any():
        raise ModelError(
            "what the network is shown is not finite",
            got=f"{int(bad.sum())} such rows of {len(rows)}, the first of them row {int(bad.nonzero()[0])}",
            do="Drop such rows, or pass features that are filled in and say which ones were.",
        )
