"""`ImplicitGuide`: a Pyro autoguide whose posterior is a network fed with noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import ImproperUniform, Independent, TorchDistribution
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from implicitvi.enumeration import is_enumerated, is_finite
from implicitvi.errors import ModelError, SetupError, check_at_least, check_choice
from implicitvi.layout import SiteLayout, bijection
from implicitvi.samplers import SAMPLERS, Sampler

_instances = itertools.count(1)


class ImplicitDistribution(TorchDistribution):
    """What a sampler draws from, as a Pyro distribution with event shape ``[D]``.

    Args:
        sampler: The network.
        log_density: Learned log density of ``z [S, D]``, ``[S]``; ``None`` while there is none.
        batch_shape: Batch shape; every entry gets noise of its own.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        sampler: Sampler,
        *,
        log_density: Callable[[Tensor], Tensor] | None = None,
        batch_shape: torch.Size = torch.Size(),
    ):
        self.sampler = sampler
        self.log_density = log_density
        super().__init__(batch_shape, torch.Size([sampler.latent_dim]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ImplicitDistribution:
        """The same distribution with another batch shape."""
        return ImplicitDistribution(
            self.sampler, log_density=self.log_density, batch_shape=torch.Size(batch_shape)
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Reparameterised draws ``[*sample_shape, *batch_shape, D]``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        draws: Tensor = self.sampler(shape.numel())
        return draws.reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The *learned* log density in nats; raises before there is one."""
        if self.log_density is None:
            raise SetupError(
                "the density of an implicit posterior is not known, only learned beside its draws",
                do="Train the guide with AVBSVI, or with pyro.infer.SVI and loss=AVB_ELBO(); Trace_ELBO "
                "cannot.",
            )
        flat = value.reshape(-1, *self.event_shape)
        return self.log_density(flat).reshape(value.shape[:-1])


def check_site(name: str, fn: Any) -> None:
    """Raise `ModelError` unless a latent site that is not summed out is continuous and maps to the real line."""
    try:
        discrete = fn.support.is_discrete
    except (AttributeError, NotImplementedError):
        discrete = False
    if not discrete:
        bijection(name, fn)
        return
    if is_finite(fn):
        raise ModelError(
            f"the discrete latent site {name!r} is not marked to be summed out",
            do=f'Write pyro.sample({name!r}, ..., infer={{"enumerate": "parallel"}}), or decorate the model with '
            "@pyro.infer.config_enumerate.",
        )
    if isinstance(fn, Independent):
        raise ModelError(
            f"the discrete latent site {name!r} joins several discrete values with to_event, which Pyro cannot "
            "enumerate",
            do="Declare them independent: a pyro.plate in place of to_event.",
        )
    raise ModelError(
        f"the discrete latent site {name!r} has infinitely many values, or too many to list, and cannot be "
        "summed out",
        got=type(fn).__name__,
        do="Integrate it out by hand (dist.GammaPoisson for a Poisson with a Gamma rate), or condition on it.",
    )


class _Readable(Messenger):
    """Shows a model to an autoguide: sequential plates unrolled, a value for sites that cannot be drawn.

    Refuses sites of which a continuous guide can make nothing, before anything asks for their support.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not is_hidden(msg):
            check_site(msg["name"], msg["fn"])
        msg["cond_indep_stack"] = tuple(
            frame
            for frame in msg["cond_indep_stack"]
            if frame.vectorized or frame.full_size not in (None, frame.size)
        )
        if isinstance(msg["fn"], ImproperUniform) and msg["value"] is None:
            shape = msg["fn"].shape()
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(torch.zeros(transform.inverse_shape(shape)))


def is_hidden(msg: Any) -> bool:
    """Whether a guide of the continuous latent sites passes over a site."""
    return bool(prototype_hide_fn(msg)) or is_enumerated(msg)


class ImplicitGuide(AutoContinuous):
    """Automatic guide whose posterior is implicit: draws of a network, with no density.

    Discrete latent sites marked ``infer={"enumerate": "parallel"}`` are summed out of the model; the guide does not
    have them. All continuous latent sites of ``model`` are transformed to the real line and laid out on one vector
    ``u [D]``, as in every `pyro.infer.autoguide.AutoContinuous`; a `Sampler` draws ``u``. Train it with
    `AVBSVI`, or with `pyro.infer.SVI` and the loss `AVB_ELBO`.

    The networks are built when the model is first seen: by the first training step, or by `setup`.

    Args:
        model: A Pyro model with continuous latent sites.
        sampler: ``"gated"``, ``"dense"``, ``"residual"``, ``"noise_basis"``, ``"semi_implicit"``, or a function of
            the latent dimension ``D`` that returns a `Sampler`.
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

    References:
        Adversarial Variational Bayes: Unifying Variational Autoencoders and Generative Adversarial Networks,
        Lars Mescheder, Sebastian Nowozin, Andreas Geiger, 2017.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        sampler: str | Callable[[int], Sampler] = "gated",
        init_loc_fn: Callable[..., Any] = init_to_median,
        name: str | None = None,
    ):
        super().__init__(_Readable()(model), init_loc_fn=init_loc_fn)
        if isinstance(sampler, str):
            check_choice("sampler", sampler, SAMPLERS)
        self._pyro_name = name or f"{type(self).__name__}_{next(_instances)}"
        self._make_sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self._learned: tuple[Callable[[Tensor], Tensor]] | None = None  # a tuple: no submodule

    _prototype_hide_fn = staticmethod(is_hidden)

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has seen the model and has its networks."""
        return self.prototype_trace is not None

    @property
    def layout(self) -> SiteLayout:
        """The latent sites on the flat vector ``u``."""
        self._require_setup()
        layout: SiteLayout = self._layout
        return layout

    def setup(self, *args: Any, **kwargs: Any) -> ImplicitGuide:
        """Run the model once with its arguments and build the networks; does nothing the second time.

        Returns:
            The guide itself, now with ``parameters()`` and a ``state_dict()``.

        Raises:
            ModelError: The model has no continuous latent site, has a discrete one that is not summed out, or has
                latents in a subsampled plate.
        """
        if not self.is_set_up:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            trace = latent_trace(self.model, *args, **kwargs)
        check_latents(trace)
        super()._setup_prototype(*args, **kwargs)
        self._layout = SiteLayout.from_trace(self.prototype_trace)
        start = self._init_loc()
        self.sampler = self._make_sampler(self.latent_dim).to(start)
        self.sampler.loc.copy_(start)

    def get_posterior(self, *args: Any, **kwargs: Any) -> ImplicitDistribution:
        """The distribution of ``u [D]``; its ``log_prob`` is the learned one where there is one."""
        log_density = None if self._learned is None else self._learned[0]
        return ImplicitDistribution(self.sampler, log_density=log_density)

    @property
    def has_log_density(self) -> bool:
        """Whether an adversary has been trained beside the guide, so that `get_posterior` can score."""
        return self._learned is not None

    def set_log_density(self, log_density: Callable[[Tensor], Tensor] | None) -> None:
        """Attach a learned log density of ``u [S, D]``; a trained adversary does."""
        self._learned = None if log_density is None else (log_density,)

    @torch.no_grad()
    def sample_unconstrained(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Draws of the unconstrained vector: ``u [S, D]``. Arguments as for `sample`."""
        check_at_least("num_samples", num_samples, 1)
        self._require_setup(*args, **kwargs)
        draws: Tensor = self.sampler(num_samples)
        return draws

    def sample(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw from the posterior.

        Args:
            num_samples: Number ``S`` of draws.
            *args: The model's arguments; may be left out once the guide is set up.
            **kwargs: The model's keyword arguments, likewise.

        Returns:
            ``{site: [S, *site shape]}``, constrained, without gradients.

        Raises:
            SetupError: The guide has not seen the model's arguments.
        """
        u = self.sample_unconstrained(num_samples, *args, **kwargs)
        return self.layout.unpack(u)[0]

    @torch.no_grad()
    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median of each entry of each site, from ``num_samples`` draws: ``{site: [*site shape]}``."""
        draws = self.sample(num_samples, *args, **kwargs)
        return {name: value.median(0).values for name, value in draws.items()}

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Sequence[float] | Tensor,
        *args: Any,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Posterior quantiles, from ``num_samples`` draws: ``{site: [len(quantiles), *site shape]}``."""
        draws = self.sample(num_samples, *args, **kwargs)
        return {
            name: value.quantile(torch.as_tensor(quantiles).to(value), 0)
            for name, value in draws.items()
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the sampler's state; the guide must have been set up, so that there is something to load into."""
        self._require_setup()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _require_setup(self, *args: Any, **kwargs: Any) -> None:
        if self.is_set_up:
            return
        try:
            if not args and not kwargs:
                raise TypeError("no arguments given")
            self.setup(*args, **kwargs)
        except TypeError as error:
            raise SetupError(
                "the guide has not seen its model yet, so its latent sites are not known",
                got=str(error),
                do="Train it, or call guide.setup(...) with the model's arguments, first.",
            ) from error


def latent_trace(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Trace of the model's unobserved sample sites, those aside that are summed out."""
    traced = pyro.poutine.trace(pyro.poutine.block(_Readable()(model), is_hidden))
    try:
        with pyro.poutine.block():
            return traced.get_trace(*args, **kwargs)
    except ModelError as error:  # Pyro raises errors again, with a table of shapes
        raise error.__cause__ if isinstance(error.__cause__, ModelError) else error from None


def check_latents(trace: Any) -> None:
    """Raise `ModelError` unless every latent site of the trace can be drawn by a flat sampler."""
    sites = dict(trace.iter_stochastic_nodes())
    if not sites:
        raise ModelError(
            "the model has no latent site to draw",
            do="Check that the sites to infer are not observed, and that observed ones get obs=.",
        )
    local = {
        frame.name
        for node in sites.values()
        for frame in node["cond_indep_stack"]
        if frame.full_size and frame.full_size != frame.size
    }
    if local:
        raise ModelError(
            f"latent sites stand in a subsampled plate: {', '.join(sorted(local))}",
            do="Run the plate in full, or use amortized inference; only global latents may meet minibatches.",
        )
