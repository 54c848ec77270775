"""`ImplicitGuide`: a Pyro autoguide whose posterior is a network fed with noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import constraints

from implicitvi.avb.multimodal import MixtureSampler
from implicitvi.avb.samplers import SAMPLERS, Sampler
from implicitvi.errors import ModelError, OptionError, SetupError, ShapeError, check_choice, check_function, check_whole
from implicitvi.inference.amortization import (
    TRAIN,
    Amortization,
    Amortize,
    check_finite,
    dataset_sampler,
    draw_plate,
    plate_sampler,
    require_data,
    rows_of_run,
    sample_in_plates,
)
from implicitvi.inference.copies import Copyable
from implicitvi.inference.modes import Mode, split
from implicitvi.inference.own_functions import OWN_SAMPLER, own_sampler
from implicitvi.numerics.doors import exclusive, with_gradients
from implicitvi.pyro_model.checks import PrepareForGuide, check_latents, is_hidden, latent_trace
from implicitvi.pyro_model.plates import PlateRun, read_plate
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target
from implicitvi.rng import RandomStream

_instances = itertools.count(1)


def _unknown_of_dataset(_: Tensor) -> Tensor:
    """Raise `SetupError`, in the role of a learned log density, for guides amortized over datasets."""
    advice = "Compare draws, guide.sample(num_samples, ...), or fit ImplicitGuide(model), not amortized, to this data."
    message = f"A guide amortized over datasets has no learned density. {advice}"
    raise SetupError(message, faq="the-density-of-the-posterior-is-not-known")


class ImplicitDistribution(TorchDistribution):
    """A sampler's distribution as a Pyro distribution with event shape ``[D]``.

    Args:
        draw: Function that returns ``S`` reparameterised draws ``[S, D]``, such as a `Sampler`.
        latent_dim: Dimension ``D`` of a draw.
        log_density: Learned log density of ``z [S, D]``, ``[S]``; ``None`` while there is none.
        batch_shape: Batch shape; every entry gets noise of its own.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        latent_dim: int,
        *,
        log_density: Callable[[Tensor], Tensor] | None = None,
        batch_shape: torch.Size = torch.Size(),
    ):
        self.draw = draw
        self.log_density = log_density
        super().__init__(batch_shape, torch.Size([latent_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ImplicitDistribution:
        """Return the same distribution with another batch shape."""
        return ImplicitDistribution(
            self.draw, self.event_shape[0], log_density=self.log_density, batch_shape=torch.Size(batch_shape)
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw reparameterised ``[*sample_shape, *batch_shape, D]``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.draw(shape.numel()).reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the *learned* log density in nats.

        Raises:
            SetupError: No density has been learned.
            ShapeError: The values are not real numbers, or their last axis is not that of a draw.
        """
        if self.log_density is None:
            raise SetupError(
                f"The density of an implicit posterior must be learned first. {TRAIN}",
                faq="the-density-of-the-posterior-is-not-known",
            )
        points, size = _real(value), self.event_shape[0]
        if points is None:
            raise ShapeError.must_be("the points to score", f"real numbers [..., {size}]", repr(value))
        if points.shape[-1:] != self.event_shape:
            raise ShapeError.must_be("the points to score", f"of shape [..., {size}]", tuple(points.shape))
        flat = points.reshape(-1, *self.event_shape)
        return self.log_density(flat).reshape(points.shape[:-1])


def _maker_of(sampler: str | Callable[..., Sampler]) -> Callable[..., Sampler]:
    if isinstance(sampler, str):
        check_choice("sampler", sampler, SAMPLERS)
        return SAMPLERS[sampler]
    check_function("sampler", sampler, OWN_SAMPLER)
    return sampler


def _checked(name: object) -> str | None:
    if isinstance(name, str | None):
        return name
    raise OptionError.must_be("name", "a str, or None", repr(name))


class ImplicitGuide(Copyable, AutoContinuous):
    """An automatic guide with an implicit posterior: draws of a network, without a density.

    Discrete latent sites marked ``infer={"enumerate": "parallel"}`` are summed out of the model; the guide does not
    have them. All continuous latent sites of ``model`` are transformed to the real line and laid out on one vector
    ``u [D]``, as in every `pyro.infer.autoguide.AutoContinuous`; a `Sampler` draws ``u``. Train the guide with
    `AVBSVI`, or with `pyro.infer.SVI` and the loss `AVB_ELBO`.

    The networks are built when the guide first sees the model: in the first training step, or in `setup`.

    An amortized guide is one network for many posteriors. Over a *plate*, ``amortize={"plate": features}``, it draws
    the latents inside from the features of each element, so that minibatches of the plate, and elements that it never
    saw, have posteriors too; ``amortize="plate"`` takes everything that the model observes there as features. Over
    *datasets*, ``amortize=features``, it draws all latents from the features of a dataset; train it on stacks of
    datasets, with one more dimension in front of every tensor, and sample it with the arguments of one.

    Args:
        model: A Pyro model with continuous latent sites.
        amortize: The name of a plate, ``{plate: features}``, or ``features``: a function of the model's arguments that
            returns a row for each element of the plate, ``[N, ...]``, or one tensor for a dataset.
        sampler: ``"gated"``, ``"dense"``, ``"residual"``, ``"noise_basis"``, ``"semi_implicit"``, or a function of
            the latent dimension ``D`` that returns a `Sampler`; an amortized guide passes it ``context_dim`` too.
        init_loc_fn: Where the sites start, one of Pyro's ``init_to_…`` functions.
        name: Name of the guide in Pyro's parameter store and of its auxiliary site. The default is unique in
            the process, so that no two guides share parameters by accident.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
        >>> guide = ImplicitGuide(model).setup(torch.zeros(3))
        >>> guide.sample(5)["mu"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        amortize: Amortize | None = None,
        sampler: str | Callable[..., Sampler] = "gated",
        init_loc_fn: Callable[..., Any] = init_to_median,
        name: str | None = None,
    ):
        check_function("model", model, "a function, the Pyro model")
        check_function("init_loc_fn", init_loc_fn, "a function such as pyro.infer.autoguide.init_to_median")
        self._make = partial(type(self), model, amortize=amortize, sampler=sampler, init_loc_fn=init_loc_fn)
        super().__init__(PrepareForGuide()(model), init_loc_fn=init_loc_fn)
        self._make_sampler = _maker_of(sampler)
        self._pyro_name = _checked(name) or f"{type(self).__name__}_{next(_instances)}"
        self.amortization = None if amortize is None else Amortization.parse(amortize)
        self._log_density: Callable[[Tensor], Tensor] | None = None
        self._log_ratio: Callable[[Tensor], Tensor] | None = None
        self._restore: Callable[[ImplicitGuide], None] | None = None
        self._stored: SiteLayout | None = None  # of a guide that has been loaded and can draw

    _prototype_hide_fn = staticmethod(is_hidden)
    sampler: Any  # once the guide has its networks

    @property
    def is_set_up(self) -> bool:
        """True once the guide has seen the model and has its networks."""
        return self.prototype_trace is not None

    @property
    def layout(self) -> SiteLayout:
        """The latent sites on the flat vector ``u``."""
        _require_setup(self)
        layout: SiteLayout = self._layout
        return layout

    @with_gradients()
    def setup(self, *args: Any, **kwargs: Any) -> ImplicitGuide:
        """Run the model with its arguments and build the networks, the first time only.

        Returns:
            The guide itself, now with ``parameters()`` and a ``state_dict()``.

        Raises:
            ModelError: The model has no continuous latent site, has a discrete one that is not summed out, or has
                latents in a subsampled plate.
        """
        if not self.is_set_up:
            self._setup_prototype(*args, **kwargs)
        return self

    def build(self, target: Target) -> None:
        """Build the networks for a target, and check that it has the guide's latent sites.

        Raises:
            ModelError: The model cannot be drawn by a guide, or has other latent sites than the guide.
        """
        self.setup(*target.args, **target.kwargs)
        expected, got = (
            {site.name: site.open_shape(self.plate) for site in layout.sites} for layout in (self.layout, target.layout)
        )
        if got != expected:
            advice = "Give ImplicitGuide and AVBSVI the same model, and data of the same size."
            what = "the latent sites of the model"
            raise ModelError.must_be(what, f"the guide's, {expected}", got, advice, faq="sites-or-shapes-have-changed")

    def restore_with(self, restore: Callable[[ImplicitGuide], None], layout: SiteLayout | None = None) -> None:
        """Call a function with this guide as soon as it has its networks; with a layout, it has them at once."""
        self._restore, self._stored = restore, layout
        if self.is_set_up:
            self._restore_now()
        else:
            _build_stored(self)

    def _restore_now(self) -> None:
        if self._restore is not None:
            self._restore(self)
            self._restore = None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with restored_on_error(self):
            self._build(*args, **kwargs)
            self._restore_now()

    @torch.no_grad()
    def _build(self, *args: Any, **kwargs: Any) -> None:
        trace = latent_trace(self.model, *args, **kwargs)
        plate = None if self.plate is None else self._read_plate(*args, **kwargs)
        check_latents(trace, amortized=self.plate)
        if plate is not None:
            self.sampler = plate_sampler(*plate, self._new_sampler)
            self._layout, self.prototype_trace = plate[0].layout.all, trace
            return
        super()._setup_prototype(*args, **kwargs)
        self._layout = SiteLayout.from_trace(self.prototype_trace)
        start = self._init_loc()
        if self.amortization is None:
            single: Sampler = self._new_sampler(self.latent_dim).to(start)
            single.loc.copy_(start)
            self.sampler = single
            return
        self.sampler = dataset_sampler(self.amortization.row(*args, **kwargs), start, self._new_sampler)

    def _new_sampler(self, latent_dim: int, **context: int) -> Sampler:
        return own_sampler(self._make_sampler, latent_dim, **context)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"master": None}

    def fresh_copy(self) -> ImplicitGuide:
        """Return another guide of the same model with the same options, not set up and with networks of its own."""
        return self._make()

    def split(self, modes: Sequence[Mode]) -> Sampler:
        """Give each of several far modes a sampler of its own; a single mode only moves the one sampler.

        Returns:
            The sampler, a `MixtureSampler` of several modes.
        """
        self.sampler = split(self.sampler, modes, self._new_sampler)
        sampler: Sampler = self.sampler
        return sampler

    def split_as(self, weights: Tensor | None) -> None:
        """Make as many samplers as there are weights of modes in the state of another guide; ``None`` for one."""
        if weights is not None and len(weights) != self.num_modes:
            place = self.sampler.loc, self.sampler.scale_tril
            self.split([Mode(weight, *place) for weight in weights.tolist()])

    @property
    def num_modes(self) -> int:
        """Number of far modes that have a sampler of their own; 1 where one sampler makes all draws."""
        sampler = getattr(self, "sampler", None)
        return len(sampler.weights) if isinstance(sampler, MixtureSampler) else 1

    @property
    def plate(self) -> str | None:
        """The plate that the guide is amortized over; ``None`` for datasets, or for a guide that is not amortized."""
        return None if self.amortization is None else self.amortization.plate

    def _read_plate(self, *args: Any, **kwargs: Any) -> tuple[PlateRun, Tensor]:
        """Return a run of the amortized plate, and the features of its elements or of the whole plate."""
        assert self.plate is not None and self.amortization is not None
        with torch.no_grad():
            run = read_plate(self.model, self.plate, *args, **kwargs)
        return run, self.amortization.rows(run, *args, **kwargs)

    def get_posterior(self, *args: Any, **kwargs: Any) -> ImplicitDistribution:
        """Return the distribution of ``u [D]``, with the learned ``log_prob`` where there is one.

        Raises:
            SetupError: The guide is amortized over a plate, or has not seen its model's arguments.
        """
        if self.plate is not None:
            advice = "Draw them with guide.sample(num_samples, ...) and the model's arguments."
            raise SetupError(f"The latents of a plate must be drawn: they have no single distribution. {advice}")
        _require_setup(self, *args, **kwargs)
        if self.amortization is None:
            return ImplicitDistribution(self.sampler.draws, self.sampler.latent_dim, log_density=self._log_density)
        require_data(*args, **kwargs)
        local = self.sampler.local
        row = self.amortization.row(*args, **kwargs)
        check_finite(row)
        x = self.sampler.context(row, None)
        return ImplicitDistribution(
            lambda count: local.draws(count, x)[:, 0], local.latent_dim, log_density=_unknown_of_dataset
        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw ``u [D]`` as the auxiliary site of a guide, scored by the learned density, but without gradients."""
        posterior = self.get_posterior(*args, **kwargs)
        posterior.log_density = posterior.log_density and partial(_score_fixed, self, posterior.log_density)
        u: Tensor = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
        return u

    @exclusive()
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site once as a Pyro guide does, inside its plates: ``{site: [*site shape]}``."""
        if self.plate is None:
            values: dict[str, Tensor] = super().forward(*args, **kwargs)
            return values
        if any(isinstance(handler, IndepMessenger) for handler in _PYRO_STACK):
            advice = "Use guide.sample(num_samples, ...), or Predictive with parallel=False."
            raise ModelError(f"A guide amortized over a plate must run outside of a plate of particles. {advice}")
        self.setup(*args, **kwargs)
        run, rows = self._read_plate(*args, **kwargs)
        return sample_in_plates(run, self.plate, self.sampler, rows_of_run(rows, run))

    @property
    def has_log_density(self) -> bool:
        """True if an adversary has been trained beside the guide, so that `get_posterior` can score."""
        return self._log_density is not None

    def set_log_density(
        self, log_density: Callable[[Tensor], Tensor] | None, log_ratio: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Attach a learned log density of ``u [S, D]``, and its log ratio to the contrast, as training does."""
        self._log_density, self._log_ratio = log_density, log_ratio

    @torch.no_grad()
    def log_ratio(self, u: Tensor) -> Tensor | None:
        """Return the learned ``log q - log r`` to the contrast at draws ``u [S, D]``, ``None`` without one."""
        return None if self._log_ratio is None else self._log_ratio(u)

    def sample_unconstrained(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the unconstrained vector: ``u [S, D]``. Arguments as for `sample`."""
        return self.draw(num_samples, *args, **kwargs)[0]

    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the posterior.

        Args:
            num_samples: Number ``S`` of draws.
            *args: The model's arguments; optional once the guide is set up. An amortized guide needs them to draw the
                posterior of *these* data. Features of a whole plate give draws of all of it, minibatch or not.
            **kwargs: The model's keyword arguments, likewise.

        Returns:
            ``{site: [S, *site shape]}``, constrained, without gradients.

        Raises:
            SetupError: The guide has not seen the model's arguments.
        """
        u, layout = self.draw(num_samples, *args, **kwargs)
        return layout.unpack(u)[0]

    @exclusive()
    @torch.no_grad()
    def draw(self, num_samples: int, *args: Any, **kwargs: Any) -> tuple[Tensor, SiteLayout]:
        """Draw ``u [S, D]``; return it with the layout of its sites. Arguments as for `sample`."""
        num_samples = check_whole("num_samples", num_samples)
        _require_setup(self, *args, **kwargs)
        if self.amortization is None:
            return self.sampler.draws(num_samples), self.layout
        require_data(*args, **kwargs)
        if self.plate is None:
            return self.get_posterior(*args, **kwargs).rsample((num_samples,)), self.layout
        run, rows = self._read_plate(*args, **kwargs)
        return draw_plate(run, self.sampler, rows, num_samples)

    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of each entry of each site: ``{site: [*site shape]}``."""
        draws = self.sample(num_samples, *args, **kwargs)
        return {name: value.median(0).values for name, value in draws.items()}

    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return posterior quantiles, from ``num_samples`` draws: ``{site: [len(quantiles), *site shape]}``.

        Raises:
            OptionError: The quantiles are not numbers from 0 to 1.
        """
        shares = _shares(quantiles)
        draws = self.sample(num_samples, *args, **kwargs)
        return {name: quantiles_of(value, shares) for name, value in draws.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the sampler's state into a guide that has been set up."""
        _require_setup(self)
        self.split_as(state_dict.get("sampler.weights"))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def quantiles_of(value: Tensor, shares: Tensor) -> Tensor:
    """Return the quantiles of draws ``value [S, ...]``: ``[*shares shape, ...]``, of any number of draws."""
    if len(value) <= 2**24:  # as many as torch takes
        return value.quantile(shares.to(value), 0)
    found: Tensor = torch.as_tensor(np.quantile(value.cpu().numpy(), shares.cpu().numpy(), axis=0)).to(value)
    return found


def _real(value: Any) -> Tensor | None:
    """Return a value as a dense tensor of real numbers, ``None`` for anything else."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_dense = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
    return tensor if is_dense and not tensor.is_complex() else None


def _shares(quantiles: Sequence[float] | Tensor) -> Tensor:
    shares = _real(quantiles)
    if shares is None or shares.dim() > 1 or not ((shares >= 0) & (shares <= 1)).all():
        raise OptionError.must_be("quantiles", "numbers from 0 to 1", repr(quantiles), "Pass one, or a list.")
    return shares


def _score_fixed(guide: ImplicitGuide, log_density: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Return the learned log density in a loss; raise `SetupError` if the loss could move the sampler along it."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in guide.parameters()):
        message = "The learned density of an implicit posterior does not follow its sampler, so a loss that takes "
        message += f"its gradient would ruin the guide. {TRAIN} Evaluate other losses under torch.no_grad()."
        raise SetupError(message, faq="the-density-of-the-posterior-is-not-known")
    return log_density(u)


def _require_setup(guide: ImplicitGuide, *args: Any, **kwargs: Any) -> None:
    if guide.is_set_up or (guide._stored is not None and not args and not kwargs):
        return
    try:
        if not args and not kwargs:
            raise TypeError("no arguments")
        guide.setup(*args, **kwargs)
    except TypeError as error:
        advice = "Train it, or call guide.setup(...) with the model's arguments, first."
        raise SetupError.must_be("the guide", "set up with its model's arguments", error, advice) from error


@contextmanager
def restored_on_error(guide: ImplicitGuide) -> Iterator[None]:
    """Leave a guide as it was, networks and all, where an error or an interrupt ends the ``with`` block."""
    trace, restore = guide.prototype_trace, guide._restore
    networks = guide._modules.get("sampler")
    densities = guide._log_density, guide._log_ratio
    weights = {} if networks is None else {k: v.detach().clone() for k, v in networks.state_dict().items()}
    try:
        yield
    except BaseException:
        guide.prototype_trace, guide._restore = trace, restore
        guide.set_log_density(*densities)
        guide._modules.pop("sampler", None)
        if networks is not None:
            guide.sampler = networks
            networks.load_state_dict(weights)
        raise


def _build_stored(guide: ImplicitGuide) -> None:
    """Build the networks of a stored layout: they can draw before the guide has seen the model's arguments."""
    if guide._stored is not None and guide._restore is not None:
        with RandomStream(0):  # leaves the random numbers of the process alone
            guide._layout, guide.sampler = guide._stored, guide._new_sampler(guide._stored.dim)
        guide._restore(guide)
