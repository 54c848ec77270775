"""Simulation-based calibration: test an inference algorithm on average over the data of a model.

Latents drawn with data from the joint distribution of a model are one more draw of the posterior given the data. So
their ranks among the draws of an exact posterior are uniform, for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from implicitvi.diagnostics.posterior import TrainedFit, TrainedGuide, check_model, tensors_of
from implicitvi.errors import ModelError, OptionError, ShapeError, check_flag, check_whole, reason_of
from implicitvi.numerics.doors import with_gradients
from implicitvi.numerics.types import Draws, Model
from implicitvi.pyro_model.enumeration import Enumerate, batchable, is_enumerated, log_sum
from implicitvi.pyro_model.tracing import is_scored, plate_nesting, run_at, score, unvalidated
from implicitvi.rng import forked

Values = dict[str, Tensor]
SIMULATIONS = 10_000  # sets of uniform ranks from which the bands are computed
LEVEL = 0.95
LOG_LIKELIHOOD = "log likelihood"
SIMULATED = "Calibration needs a model that can be simulated"

MakeGuide = Callable[[Model, Values], TrainedGuide | TrainedFit | Draws]


@dataclass(frozen=True)
class Calibration:
    """A set of ranks of true values among draws of the posterior.

    Attributes:
        ranks: For each quantity its rank in every dataset, 0 to ``num_draws``: ``[N]``.
        num_draws: Number of draws for each rank.
    """

    ranks: dict[str, Tensor]
    num_draws: int

    def difference(self, quantity: str) -> Tensor:
        """Return the ECDF of a quantity's ranks minus that of uniform ones, at ``1, …, num_draws``: ``[num_draws]``.

        Below 0 on the left and above 0 on the right, the posterior is too wide; the other way round it is too narrow.
        Above 0 throughout it lies too high, below 0 too low.
        """
        return ecdf(self.ranks[quantity], self.num_draws) / self.num_datasets - uniform_shares(self.num_draws)

    @property
    def num_datasets(self) -> int:
        """Number ``N`` of datasets."""
        return len(next(iter(self.ranks.values())))

    def band(self) -> tuple[Tensor, Tensor]:
        """Return the lower and upper end of the simultaneous 95 % band for the `difference` of uniform ranks."""
        lower, upper = band(self.num_datasets, self.num_draws)
        return lower / self.num_datasets, upper / self.num_datasets

    @property
    def p_values(self) -> dict[str, float]:
        """The p-value of each quantity, by `uniformity`."""
        return {name: uniformity(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def ok(self) -> bool:
        """True unless a p-value is significant at level 0.05, with Bonferroni's correction."""
        return min(self.p_values.values()) * len(self.ranks) >= 1 - LEVEL

    def __str__(self) -> str:
        verdict = "calibrated" if self.ok else "NOT calibrated"
        lines = [f"{verdict}: {self.num_datasets} datasets, ranks among {self.num_draws} draws"]
        lines += [f"{'':24}{'p':>8}{'of the 95 % band':>20}  what the ranks say"]
        for name, p in self.p_values.items():
            said = "" if p * len(self.ranks) >= 1 - LEVEL else self._reading(name)
            lines += [f"{name:24}{p:8.4f}{band_share(self.ranks[name], self.num_draws):20.2f}  {said}"]
        return "\n".join(lines)

    def _reading(self, quantity: str) -> str:
        """Describe the error that the ranks of a quantity show: one of location or of width."""
        z = (2 * self.ranks[quantity].double() + 1) / (self.num_draws + 1) - 1  # uniform on -1 to 1
        location = z.mean().item() / (1 / 3 / len(z)) ** 0.5
        width = (z.square().mean().item() - 1 / 3) / (4 / 45 / len(z)) ** 0.5
        if abs(location) > abs(width):
            return "draws too low" if location > 0 else "draws too high"
        return "draws too narrow" if width > 0 else "draws too wide"


@with_gradients()
def sbc(
    model: Model,
    make_guide: MakeGuide,
    *args: Any,
    num_datasets: int = 200,
    num_draws: int = 99,
    quantities: Callable[[Values, Values], Values] | None = None,
    log_likelihood: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> Calibration:
    """Draw latents and data from a model, fit the posterior given the data, and rank the latents among its draws.

    Args:
        model: A Pyro model. All its observed sites are simulated, so only the shapes of their values in ``args`` count.
        make_guide: Called with the model conditioned on a dataset and the dataset, ``{observed site: value}``. Returns
            a trained guide, the fit of one, or draws ``{site: [num_draws, *site shape]}``. To fit each dataset:
            ``lambda model, data: AVBSVI(model, ImplicitGuide(model)).run(*args)``; with an amortized guide:
            ``lambda model, data: guide.sample(99, data["obs"])``. Discrete sites marked
            ``infer={"enumerate": "parallel"}`` are simulated, but not ranked, and need no draws.
        *args: The model's arguments.
        num_datasets: Number ``N`` of datasets.
        num_draws: Number of draws for each rank. They must be independent, so thin those of a chain.
        quantities: Further quantities to rank: a function of latents ``{site: [S, *site shape]}`` and one dataset that
            returns ``{name: [S]}``.
        log_likelihood: Whether to rank the log likelihood too, with such discrete sites summed out. Without it the
            prior passes for the posterior.
        seed: Seed of the datasets, and of torch's generator while guides are made.
        **kwargs: The model's keyword arguments.

    Raises:
        ModelError: The model cannot be simulated, or the draws lack one of its latent sites.
        OptionError: ``make_guide`` does not return a guide, a fit or draws, or an option has a value that cannot work.
        ShapeError: ``quantities`` does not return a number for each draw, or names a quantity like an entry of a site.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration, Sean Talts, Michael Betancourt,
        Daniel Simpson, Aki Vehtari, Andrew Gelman, 2018, algorithm 1. Simulation-Based Calibration Checking for
        Bayesian Computation: The Choice of Test Quantities Shapes Sensitivity, Martin Modrák and others, 2023.
    """
    check_whole("num_datasets", num_datasets, 10)
    check_whole("num_draws", num_draws, 9)
    check_model(model, seed)
    check_flag("log_likelihood", log_likelihood)
    for option, value in (("make_guide", make_guide), ("quantities", quantities)):
        if not callable(value) and (option == "make_guide" or value is not None):
            raise OptionError.must_be(option, "a function", repr(value))
    ranks: dict[str, list[Tensor]] = {}
    with forked():
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
                ranked |= _checked(quantities(both, data), ranked, 1 + num_draws)
            for name, values in ranked.items():
                ranks.setdefault(name, []).append((values[1:] < values[0]).sum().cpu())
    return Calibration({name: torch.stack(each) for name, each in ranks.items()}, num_draws)


@torch.no_grad()
def simulate(model: Model, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
    """Draw ``{latent site: value}`` and ``{observed site: value}`` from the joint distribution of a model.

    Discrete latents that are marked to be summed out are drawn, but not returned.

    Raises:
        ModelError: A site cannot be drawn: an improper prior, or a factor, which is not a distribution.
    """
    try:
        with poutine.block():
            trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    except NotImplementedError as error:
        why = reason_of(error)
        raise ModelError(f"{SIMULATED}, but a site cannot be drawn: {why}. Give it a proper prior.") from error
    latents: Values = {}
    data: Values = {}
    nodes: dict[str, Any] = trace.nodes
    for name, node in nodes.items():
        if not is_scored(node):
            continue
        if isinstance(node["fn"], Unit):
            raise ModelError(f"{SIMULATED}, but {name!r} is a factor. Write it as an observed site.")
        if node["infer"].get("was_observed", False):
            data[name] = node["value"].detach()
        elif not is_enumerated(node):
            latents[name] = node["value"].detach()
    for kind, found in (("latent", latents), ("observed", data)):
        if not found:
            do = "Pass arguments with which it has latents and observes data; the data's values do not matter."
            raise ModelError(f"The model has no {kind} site to calibrate. {do}")
    return latents, data


def ecdf(ranks: Tensor, num_draws: int) -> Tensor:
    """Count the ``ranks [..., N]``, 0 to ``num_draws``, below 1, 2, …, ``num_draws``: ``[..., num_draws]``."""
    cells = torch.zeros(*ranks.shape[:-1], num_draws + 1, dtype=torch.long)
    return cells.scatter_add_(-1, ranks, torch.ones_like(ranks)).cumsum(-1)[..., :-1]


def uniform_shares(num_draws: int) -> Tensor:
    """Return the share of uniform ranks below 1, 2, …, ``num_draws``: ``[num_draws]``."""
    return torch.arange(1, num_draws + 1).double() / (num_draws + 1)


def band(count: int, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return lower and upper deviations ``[num_draws]`` of the `ecdf` of ``count`` ranks in a simultaneous 95 % band.

    Its pointwise level is the same at every rank, and 95 % of the ECDFs of uniform ranks lie inside throughout.

    References:
        Graphical Test for Discrete Uniformity and Its Applications in Goodness-of-Fit Evaluation and Multiple Sample
        Comparison, Teemu Säilynoja, Paul-Christian Bürkner, Aki Vehtari, 2022.
    """
    from scipy.stats import binom

    shares = uniform_shares(num_draws).numpy()
    level = np.quantile(_uniform_tails(count, num_draws), 1 - LEVEL)
    binomial = binom(count, shares)
    lower, upper = (torch.from_numpy(binomial.ppf(q) - count * shares) for q in (level, 1 - level))
    return lower, upper


def band_share(ranks: Tensor, num_draws: int) -> float:
    """Return the largest deviation of the ECDF of ``ranks [N]`` in half-widths of the `band`: at most 1 is inside."""
    lower, upper = band(len(ranks), num_draws)
    off = ecdf(ranks, num_draws) - len(ranks) * uniform_shares(num_draws)
    return torch.where(off > 0, off / upper, off / lower).max().item()


def uniformity(ranks: Tensor, num_draws: int) -> float:
    """Return the p-value of ``ranks [N]``, 0 to ``num_draws``: the smallest pointwise level of their ECDF decides."""
    below = (_uniform_tails(len(ranks), num_draws) <= _tails(ecdf(ranks, num_draws), len(ranks))).sum()
    return float((1 + below) / (1 + SIMULATIONS))


@cache
def _uniform_tails(count: int, num_draws: int) -> Any:
    """Return `_tails` of sets of ``count`` uniform ranks."""
    uniform = torch.randint(num_draws + 1, (SIMULATIONS, count), generator=torch.Generator().manual_seed(0))
    return _tails(ecdf(uniform, num_draws), count)


def _tails(counts: Tensor, count: int) -> Any:
    """Return the smallest two-sided binomial tail probability along ECDFs ``counts [..., num_draws]``: ``[...]``."""
    from scipy.stats import binom

    binomial = binom(count, uniform_shares(counts.shape[-1]).numpy())
    return np.minimum(binomial.cdf(counts.numpy()), binomial.sf(counts.numpy() - 1)).min(-1)


def _entries(values: Values) -> Values:
    """Split each site into its entries: ``{"eta[3]": [S]}``."""
    return {
        name + (f"[{','.join(map(str, index))}]" if index else ""): value[(slice(None), *index)]
        for name, value in values.items()
        for index in np.ndindex(*value.shape[1:])
    }


@torch.no_grad()
def _log_likelihood(
    given: Model, latents: Values, observed: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return the log density of the observed sites at latents ``{site: [S, *site shape]}``: ``[S]``.

    With enumerated sites it is ``log p(x, z) - log p(z)``, both summed over these.
    """
    each = [dict(zip(latents, values, strict=True)) for values in zip(*latents.values(), strict=True)]
    nodes = [node for node in run_at(given, each[0], *args, **kwargs).nodes.values() if node["type"] == "sample"]
    enumerates = any(map(is_enumerated, nodes))
    model: Any = Enumerate(-1 - plate_nesting(nodes))(given) if enumerates else given

    def scored(values: Values, leave_out: Callable[[str], bool]) -> Any:
        trace = run_at(model, values, *args, **kwargs)
        score(trace, values, [name for name in trace.nodes if leave_out(name)])
        return trace

    def one(values: Values) -> Tensor:
        if enumerates:
            return log_sum(scored(values, lambda _: False)) - log_sum(scored(values, lambda name: name in observed))
        nodes = scored(values, lambda name: name not in observed).nodes
        return torch.stack([nodes[name]["log_prob_sum"] for name in observed]).sum()

    with unvalidated(), batchable(quiet=True):
        try:
            scores: Tensor = torch.func.vmap(one, randomness="different")(latents)
        except (RuntimeError, ValueError):  # the model branches on a latent
            scores = torch.stack(list(map(one, each)))
    return scores


def _draws(made: Any, num_draws: int) -> Values:
    """Return draws ``{site: [S, *site shape]}`` of the result of ``make_guide``."""
    if isinstance(made, Mapping):
        return tensors_of(made)
    guide = getattr(made, "guide", made)
    if not callable(getattr(guide, "sample", None)):
        expected = "a function that returns a guide, a fit, or draws {site: [num_draws, *site shape]}"
        raise OptionError.must_be("make_guide", expected, type(made).__name__, "End it with return guide.")
    return dict(guide.sample(num_draws))


def _checked(found: Any, ranked: Values, count: int) -> Values:
    """Return the user's quantities; raise `ShapeError` unless each is ``[count]`` and has a name of its own."""
    if not isinstance(found, Mapping):
        raise ShapeError.must_be("The result of quantities", "a dict {name: [S]}", type(found).__name__)
    for name, value in found.items():
        if name in ranked:
            raise ShapeError.must_be("The names of quantities", f"other than {', '.join(ranked)}", repr(name))
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (count,):
            raise ShapeError.must_be(f"The quantity {name!r}", f"of shape {(count,)}, one for each draw", shape)
    return dict(found)


def _check_draws(draws: Values, truth: Values, num_draws: int) -> None:
    """Raise `ModelError` unless there are draws of every latent site, of the right shape."""
    for name, value in truth.items():
        got = tuple(draws[name].shape) if name in draws else f"sites {', '.join(draws)}"
        if got != (expected := (num_draws, *value.shape)):
            do = "Return draws of every latent site from make_guide, num_draws of each."
            raise ModelError.must_be(f"The draws of site {name!r}", f"of shape {expected}", got, do)
