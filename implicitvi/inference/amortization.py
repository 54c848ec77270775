"""Amortize posteriors: one network for the latents of every datum, or of every dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor, nn

from implicitvi.avb.conditional import ConditionalSampler
from implicitvi.avb.samplers import Sampler
from implicitvi.errors import ModelError, OptionError, SetupError, ShapeError
from implicitvi.nn import LocationScaleNet
from implicitvi.pyro_model.plates import PlateRun
from implicitvi.pyro_model.sites import SiteLayout

TRAIN = "Train the guide with AVBSVI, or with pyro.infer.SVI and loss=AVB_ELBO(); Trace_ELBO cannot."
Features = Callable[..., Tensor]
Amortize = str | Mapping[str, Features] | Features


@dataclass(frozen=True)
class Amortization:
    """A plate, or datasets, that a guide is amortized over, with the features that its network sees.

    Attributes:
        plate: The plate whose elements have latents of their own; ``None`` for whole datasets.
        features: Function of the model's arguments that returns the features; ``None`` for everything that the model
            observes in the plate.
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
                raise OptionError.must_be("amortize", "one plate", sorted(amortize) or "none")
            ((plate, features),) = amortize.items()
            if isinstance(plate, str) and callable(features):
                return cls(plate, features)
        elif callable(amortize):
            return cls(None, amortize)
        expected = "the name of a plate, {plate: features} or features"
        advice = "features takes the model's arguments and returns a row for each element, or one vector for a dataset."
        raise OptionError.must_be("amortize", expected, repr(amortize), advice)

    def rows(self, run: PlateRun, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features of the elements of a plate, of all ``N`` or of those in the run: ``[N or B, C]``.

        Raises:
            ModelError: There are no features: the plate observes nothing.
            ShapeError: The function of the features returns other shapes.
        """
        layout = run.layout
        if self.features is None:
            if run.observed is None:
                message = f"Plate {self.plate!r} must observe something to show to the network."
                advice = "Pass amortize={plate: features} with a function of the model's arguments."
                raise ModelError(f"{message} {advice}", faq="a-latent-for-every-row")
            return run.observed
        rows = self.features(*args, **kwargs)
        sizes = sorted({layout.full_size, layout.size}, reverse=True)
        if not isinstance(rows, Tensor) or not rows.dim() or len(rows) not in sizes:
            got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            expected = "a tensor with a row for each element: " + " or ".join(f"[{size}, ...]" for size in sizes)
            raise ShapeError.must_be(
                f"the features of plate {self.plate!r}", expected, got, faq="a-latent-for-every-row"
            )
        return rows.flatten(1) if rows.dim() > 1 else rows[:, None]

    def row(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features of one dataset, ``[1, C]``."""
        assert self.features is not None
        row = self.features(*args, **kwargs)
        if not isinstance(row, Tensor):
            raise ShapeError.must_be("the features of a dataset", "a tensor", type(row).__name__)
        return row.reshape(1, -1)


class AmortizedSampler(nn.Module):
    """A sampler of shared latents ``g``, then of those of every datum given its features and ``g``.

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
        """Standardise features from now on by location and scale of typical ones, ``[N, C]``."""
        check_finite(rows)
        rows = rows.to(self.feature_loc)
        scale = rows.std(0, correction=0)
        self.feature_loc.copy_(rows.mean(0))
        self.feature_scale.copy_(torch.where(scale > 0, scale, 1.0))

    def context(self, rows: Tensor, g: Tensor | None, frame: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the input of the local network: ``[B, C]``, or ``[S, B, C + G]`` beside shared draws ``g [S, G]``.

        The shared draws are standardised by ``frame``, by default their sampler's location and scale.
        """
        if rows.shape[1:] != self.feature_loc.shape:
            expected = f"those that the guide was made with, [B, {len(self.feature_loc)}]"
            raise ShapeError.must_be("features", expected, tuple(rows.shape))
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


def plate_sampler(run: PlateRun, rows: Tensor, make_sampler: Callable[..., Sampler]) -> AmortizedSampler:
    """Return the sampler of shared and local latents of a plate with features ``rows [B, C]``, located at a run's."""
    g, z = run.layout.part(run.u[None])
    shared = None if g is None else make_sampler(g.shape[1])
    sampler = AmortizedSampler(shared, make_sampler, datum_dim=z.shape[-1], feature_dim=rows.shape[1]).to(run.u)
    sampler.set_units(rows)
    if shared is not None and g is not None:
        shared.loc.copy_(g[0])
    sampler.local.loc.copy_(z.mean((0, 1)))
    return sampler


def dataset_sampler(row: Tensor, start: Tensor, make_sampler: Callable[..., Sampler]) -> AmortizedSampler:
    """Return the sampler of all latents of a dataset with features ``row [1, C]``, at the location ``start [D]``."""
    sampler = AmortizedSampler(None, make_sampler, datum_dim=len(start), feature_dim=row.shape[1]).to(start)
    sampler.local.loc.copy_(start)
    return sampler


class _Drawn(Delta):
    """The distribution of a value that has been drawn, whose density nobody knows."""

    def log_prob(self, x: Tensor) -> Tensor:
        raise SetupError(
            f"The latents of a plate have draws, but not a density. {TRAIN}",
            faq="the-density-of-the-posterior-is-not-known",
        )


def sample_in_plates(run: PlateRun, plate: str, sampler: AmortizedSampler, rows: Tensor) -> dict[str, Tensor]:
    """Draw every latent site once by `pyro.sample`, inside its plates: ``{site: [*site shape]}``."""
    frames = {frame.name: frame for frames in run.frames.values() for frame in frames}
    plates = {
        name: pyro.plate(
            name, frame.full_size or frame.size, subsample=run.indices if name == plate else None, dim=frame.dim
        )
        for name, frame in frames.items()
    }
    g, z = sampler(1, rows)
    values, _ = run.layout.all.unpack(run.layout.join(g, z)[0])
    for site in run.layout.all.sites:
        density = _Drawn(values[site.name], event_dim=site.event_dim)
        with ExitStack() as stack:
            for frame in run.frames[site.name]:
                stack.enter_context(plates[frame.name])
            pyro.sample(site.name, density)
    return values


def draw_plate(run: PlateRun, sampler: AmortizedSampler, rows: Tensor, num_samples: int) -> tuple[Tensor, SiteLayout]:
    """Draw ``u [S, D]`` for features ``rows [N, C]`` of a plate; return it with the layout of its sites."""
    check_finite(rows)
    g = None if sampler.shared is None else sampler.shared.draws(num_samples)
    z = sampler.local.draws(num_samples, sampler.context(rows, g))
    layout = run.layout if len(rows) == run.layout.size else run.layout.resized(len(rows))
    return layout.join(g, z), layout.all


def rows_of_run(rows: Tensor, run: PlateRun) -> Tensor:
    """Return the features ``[B, C]`` of the elements in a run of a plate, from those of the run or the whole plate."""
    return rows if len(rows) == run.layout.size else rows[run.indices]


def require_data(*args: Any, **kwargs: Any) -> None:
    """Raise `SetupError` where an amortized guide gets no data."""
    if not args and not kwargs:
        advice = "Pass the model's arguments: guide.sample(num_samples, ...)."
        raise SetupError(f"The data must be given: an amortized guide has a posterior for each dataset. {advice}")


def check_finite(rows: Tensor) -> None:
    """Raise `ModelError` unless features ``[N, C]`` are finite: draws of others would not be.

    Do not call it in every step: the host would wait for the device.
    """
    bad = (~rows.isfinite()).any(1)
    if bad.any():
        got = f"{int(bad.sum())} of {len(rows)} rows that are not, the first of them row {int(bad.nonzero()[0])}"
        advice = "Drop such rows, or pass features that are filled in, with a mark of which ones were."
        raise ModelError.must_be("the features", "finite", got, advice)
