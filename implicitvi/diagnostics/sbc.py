"""Simulation-based calibration: whether an inference algorithm is right on average over the data of a model.

Latents and data are drawn from the joint distribution of a model; the latents are then one more draw of the posterior
given the data. So their ranks among the draws of an exact posterior are uniform, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from implicitvi.errors import ModelError, OptionError, check_whole

Values = dict[str, Tensor]
SIMULATIONS = 10_000  # sets of uniform ranks that the bands are made from
LEVEL = 0.95
LOG_LIKELIHOOD = "log likelihood"


class Posterior(Protocol):
    """What can be drawn from: a fitted guide."""

    def sample(self, num_samples: int, /) -> Values:
        """Draws ``{site: [S, *site shape]}``."""


class Fitted(Protocol):
    """What has such a guide: a fit."""

    @property
    def guide(self) -> Posterior:
        """The guide."""


MakeGuide = Callable[[Callable[..., Any], Values], Posterior | Fitted | Mapping[str, Any]]


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truth among draws of the posterior.

    Attributes:
        ranks: For each quantity the ranks in every dataset, 0 to ``num_draws``: ``[N]``.
        num_draws: Draws behind each rank.
    """

    ranks: dict[str, Tensor]
    num_draws: int

    def difference(self, quantity: str) -> Tensor:
        """The ECDF of a quantity's ranks less that of uniform ones, at ``1, …, num_draws`` draws: ``[num_draws]``.

        Below 0 on the left and above on the right says that the posterior is too wide, the other way round that it is
        too narrow; above 0 throughout that it lies too high, below that it lies too low.
        """
        ranks = self.ranks[quantity]
        return ecdf(ranks, self.num_draws) / len(ranks) - uniform_shares(self.num_draws)

    @property
    def num_datasets(self) -> int:
        """Number ``N`` of datasets."""
        return len(next(iter(self.ranks.values())))

    def band(self) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the band that holds 95 % of the `difference` of uniform ranks from end to end."""
        lower, upper = band(self.num_datasets, self.num_draws)
        return lower / self.num_datasets, upper / self.num_datasets

    @property
    def p_values(self) -> dict[str, float]:
        """For each quantity the share of uniform ranks whose ECDF strays as far, by `uniformity`."""
        return {name: uniformity(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def ok(self) -> bool:
        """Whether no quantity strays further than one in 20 exact posteriors would have one do (Bonferroni)."""
        return min(self.p_values.values()) * len(self.ranks) >= 1 - LEVEL

    def __str__(self) -> str:
        verdict = "calibrated" if self.ok else "NOT calibrated"
        lines = [
            f"{verdict}: {self.num_datasets} datasets, ranks among {self.num_draws} draws",
            f"{'':24}{'p':>8}{'of the 95 % band':>20}  what the ranks say",
        ]
        for name, p in self.p_values.items():
            share = band_share(self.ranks[name], self.num_draws)
            said = "" if p * len(self.ranks) >= 1 - LEVEL else self._reading(name)
            lines.append(f"{name:24}{p:8.4f}{share:20.2f}  {said}")
        return "\n".join(lines)

    def _reading(self, quantity: str) -> str:
        """In words what kind of error the ranks of a quantity show: of place or of width."""
        z = (2 * self.ranks[quantity].double() + 1) / (self.num_draws + 1) - 1  # uniform on -1 to 1
        count = len(z)
        place = z.mean().item() / (1 / 3 / count) ** 0.5
        width = (z.square().mean().item() - 1 / 3) / (4 / 45 / count) ** 0.5
        if abs(place) > abs(width):
            return "draws too low" if place > 0 else "draws too high"
        return "draws too narrow" if width > 0 else "draws too wide"


def sbc(
    model: Callable[..., Any],
    make_guide: MakeGuide,
    *args: Any,
    num_datasets: int = 200,
    num_draws: int = 99,
    quantities: Callable[[Values, Values], Values] | None = None,
    log_likelihood: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> Calibration:
    """Draw latents and data from a model, ask for the posterior given the data, and rank the latents among its draws.

    Args:
        model: A Pyro model. All its observed sites are drawn anew, so their values in ``args`` give shapes alone.
        make_guide: Called with the model conditioned on a dataset and the dataset, ``{observed site: value}``. Returns
            a fitted guide, the fit of one, or draws ``{site: [num_draws, *site shape]}``. Of one that fits:
            ``lambda model, data: AVBSVI(model, ImplicitGuide(model)).run(*args)``; of one that is amortized:
            ``lambda model, data: guide.sample(99, data["obs"])``. Discrete sites marked
            ``infer={"enumerate": "parallel"}`` are simulated, but neither drawn nor ranked.
        *args: The model's arguments.
        num_datasets: Number ``N`` of datasets.
        num_draws: Draws behind each rank. They must be independent, so thin those of a chain.
        quantities: Further quantities to rank: a function of latents ``{site: [S, *site shape]}`` and one dataset that
            returns ``{name: [S]}``.
        log_likelihood: Whether the log likelihood is ranked too, such discrete sites summed out. Without it the prior
            passes for the posterior.
        seed: Seed of the datasets, and of torch's generator while guides are made.
        **kwargs: The model's keyword arguments.

    Raises:
        ModelError: The model cannot be simulated, or the draws lack one of its latent sites.
        OptionError: ``make_guide`` returns nothing that has draws.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Sean Talts, Michael Betancourt,
        Daniel Simpson, Aki Vehtari, Andrew Gelman, 2018, algorithm 1. Simulation-Based Calibration Checking for
        Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity, Martin Modrák and others, 2023.
    """
    check_whole("num_datasets", num_datasets, 10)
    check_whole("num_draws", num_draws, 9)
    ranks: dict[str, list[Tensor]] = {}
    in_use = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    with torch.random.fork_rng(devices=range(in_use)):
        torch.manual_seed(seed)
        for _ in range(num_datasets):
            truth, data = simulate(model, *args, **kwargs)
            given = poutine.condition(model, data)
            draws = _draws(make_guide(given, data), num_draws)
            _check_draws(draws, truth, num_draws)
            both = {name: torch.cat([value[None], draws[name].to(value)]) for name, value in truth.items()}
            ranked = _entries(both)
            if log_likelihood:
                ranked[LOG_LIKELIHOOD] = _log_likelihood(given, both, tuple(data), args, kwargs)
            if quantities is not None:
                ranked.update(quantities(both, data))
            for name, values in ranked.items():
                ranks.setdefault(name, []).append((values[1:] < values[0]).sum().cpu())
    return Calibration({name: torch.stack(each) for name, each in ranks.items()}, num_draws)


@torch.no_grad()
def simulate(model: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Latents and data from the joint distribution of a model: ``{latent site: value}``, ``{observed site: value}``.

    Discrete latents that are marked to be summed out are drawn, and left out.

    Raises:
        ModelError: A site cannot be drawn: an improper prior, or a factor, which is no distribution.
    """
    try:
        with poutine.block():
            trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    except NotImplementedError as error:
        raise ModelError(
            "calibration needs a model that can be simulated, and a site cannot be drawn",
            got=str(error),
            do="Give it a proper prior.",
        ) from error
    latents: Values = {}
    data: Values = {}
    nodes: dict[str, Any] = trace.nodes
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or _is_deterministic(node):
            continue
        if isinstance(node["fn"], Unit):
            raise ModelError(
                f"calibration needs a model that can be simulated, and {name!r} is a factor",
                do="Write it as an observed site.",
            )
        if node["infer"].get("was_observed", False):
            data[name] = node["value"].detach()
        elif not _is_enumerated(node):
            latents[name] = node["value"].detach()
    for kind, found in (("latent", latents), ("observed", data)):
        if not found:
            raise ModelError(
                f"the model has no {kind} site, so there is nothing to calibrate",
                do="Pass arguments under which it has latents and observes data; the data's values do not matter.",
            )
    return latents, data


def ecdf(ranks: Tensor, num_draws: int) -> Tensor:
    """How many of ``ranks [..., N]``, 0 to ``num_draws``, are below 1, 2, …, ``num_draws``: ``[..., num_draws]``."""
    cells = torch.zeros(*ranks.shape[:-1], num_draws + 1, dtype=torch.long)
    return cells.scatter_add_(-1, ranks, torch.ones_like(ranks)).cumsum(-1)[..., :-1]


def uniform_shares(num_draws: int) -> Tensor:
    """The share of uniform ranks below 1, 2, …, ``num_draws``: ``[num_draws]``."""
    return torch.arange(1, num_draws + 1).double() / (num_draws + 1)


def band(count: int, num_draws: int) -> tuple[Tensor, Tensor]:
    """Lower and upper deviation of the `ecdf` of ``count`` ranks in a simultaneous band of 95 %, each ``[num_draws]``.

    The band has the same pointwise level at every rank, the level at which 95 % of the ECDFs of uniform ranks stay
    inside from end to end.

    References:
        Graphical Test for Discrete Uniformity and Its Applications in Goodness-of-Fit Evaluation and Multiple Sample
        Comparison, Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari, 2022.
    """
    from scipy.stats import binom

    shares = uniform_shares(num_draws).numpy()
    level = np.quantile(_uniform_tails(count, num_draws), 1 - LEVEL)
    ends = (binom(count, shares).ppf(q) - count * shares for q in (level, 1 - level))
    lower, upper = (torch.from_numpy(end) for end in ends)
    return lower, upper


def band_share(ranks: Tensor, num_draws: int) -> float:
    """Largest deviation of the ECDF of ``ranks [N]``, as a share of the `band`'s half-width: at most 1 is inside."""
    lower, upper = band(len(ranks), num_draws)
    off = ecdf(ranks, num_draws) - len(ranks) * uniform_shares(num_draws)
    return torch.where(off > 0, off / upper, off / lower).max().item()


def uniformity(ranks: Tensor, num_draws: int) -> float:
    """p-value of ``ranks [N]``, 0 to ``num_draws``, under uniformity, by the least pointwise level of their ECDF."""
    own = _tails(ecdf(ranks, num_draws), len(ranks))
    below = (_uniform_tails(len(ranks), num_draws) <= own).sum()
    return float((1 + below) / (1 + SIMULATIONS))


@cache
def _uniform_tails(count: int, num_draws: int) -> Any:
    """`_tails` of sets of ``count`` uniform ranks."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randint(num_draws + 1, (SIMULATIONS, count), generator=generator)
    return _tails(ecdf(uniform, num_draws), count)


def _tails(counts: Tensor, count: int) -> Any:
    """The least binomial tail probability, to either side, along ECDFs ``counts [..., num_draws]``: ``[...]``."""
    from scipy.stats import binom

    binomial = binom(count, uniform_shares(counts.shape[-1]).numpy())
    found = counts.numpy()
    return np.minimum(binomial.cdf(found), binomial.sf(found - 1)).min(-1)


def _entries(values: Values) -> Values:
    """Each entry of each site by itself: ``{"eta[3]": [S]}``."""
    return {
        name + (f"[{','.join(map(str, index))}]" if index else ""): value[(slice(None), *index)]
        for name, value in values.items()
        for index in np.ndindex(*value.shape[1:])
    }


@torch.no_grad()
def _log_likelihood(
    given: Callable[..., Any], latents: Values, observed: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Log density of the observed sites at latents ``{site: [S, *site shape]}``: ``[S]``."""
    count = len(next(iter(latents.values())))
    each = [{name: value[i] for name, value in latents.items()} for i in range(count)]
    with poutine.block():
        trace: Any = poutine.trace(pyro.condition(given, each[0])).get_trace(*args, **kwargs)
    if any(map(_is_enumerated, trace.nodes.values())):
        nesting = _plate_nesting(trace)
        return _summed_log_likelihood(given, each, observed, nesting, args, kwargs)

    def one(values: Values) -> Tensor:
        at = pyro.condition(given, values)
        with poutine.block():
            trace = poutine.trace(at).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, _: name in observed)
        return torch.stack([trace.nodes[name]["log_prob_sum"] for name in observed]).sum()

    with pyro.validation_enabled(False):
        try:
            scores: Tensor = torch.func.vmap(one, randomness="different")(latents)
        except (RuntimeError, ValueError):  # the model branches on a latent
            scores = torch.stack([one(values) for values in each])
    return scores


def _summed_log_likelihood(
    given: Callable[..., Any],
    latents: Sequence[Values],
    observed: tuple[str, ...],
    nesting: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """As `_log_likelihood` of a model with enumerated sites, ``log p(x, z) - log p(z)``, draw by draw."""
    elbo = TraceEnum_ELBO(max_plate_nesting=nesting)

    def log_density(model: Callable[..., Any]) -> float:
        """Of all that a model is conditioned on: what the ELBO is without a guide."""
        loss: float = elbo.loss(model, lambda *args, **kwargs: None, *args, **kwargs)
        return -loss

    scores = []
    with pyro.validation_enabled(False):
        for values in latents:
            at = pyro.condition(given, values)
            scores.append(log_density(at) - log_density(_Without(observed)(at)))
    return torch.tensor(scores)


class _Without(Messenger):
    """Takes the density of some sites out of a model; they stay, as Pyro's counting of Markov chains asks for."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["mask"] = False


def _plate_nesting(trace: Any) -> int:
    """How many dimensions the vectorised plates of a trace take."""
    nodes = (node for node in trace.nodes.values() if node["type"] == "sample")
    frames = (frame for node in nodes for frame in node["cond_indep_stack"] if frame.vectorized)
    return max((-frame.dim for frame in frames), default=0)


def _is_enumerated(node: dict[str, Any]) -> bool:
    """Whether a sample site is a discrete latent that is marked to be summed out."""
    return bool(
        node["type"] == "sample"
        and not node["is_observed"]
        and node["infer"].get("enumerate") == "parallel"
        and getattr(node["fn"], "has_enumerate_support", False)
    )


def _is_deterministic(node: dict[str, Any]) -> bool:
    return bool(node["infer"].get("_deterministic", False))


def _draws(made: Any, num_draws: int) -> Values:
    """Draws of what ``make_guide`` has returned: ``{site: [S, *site shape]}``."""
    if isinstance(made, Mapping):
        return {name: torch.as_tensor(value) for name, value in made.items()}
    guide = getattr(made, "guide", made)
    if not callable(getattr(guide, "sample", None)):
        raise OptionError(
            "make_guide has returned nothing that has draws",
            got=type(made).__name__,
            expected="a fitted guide, a fit, or draws {site: [num_draws, *site shape]}",
            do="End it with return guide.",
        )
    draws: Values = guide.sample(num_draws)
    return draws


def _check_draws(draws: Values, truth: Values, num_draws: int) -> None:
    """Raise `ModelError` unless there are draws of every latent site, of the right shape."""
    for name, value in truth.items():
        expected = (num_draws, *value.shape)
        got = tuple(draws[name].shape) if name in draws else f"sites {', '.join(draws)}"
        if got != expected:
            raise ModelError(
                f"the draws of site {name!r} do not fit the model",
                got=got,
                expected=expected,
                do="Return draws of every latent site from make_guide, num_draws of each.",
            )
