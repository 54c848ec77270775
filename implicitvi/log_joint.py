"""The log joint density of a Pyro model at many particles at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.overrides import TorchFunctionMode

from implicitvi.compiled import CompiledScore
from implicitvi.errors import ModelError, check_choice
from implicitvi.layout import SiteLayout
from implicitvi.minibatch import Minibatch

Model = Callable[..., Any]
Run = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
MODES = ("auto", "vmap", "loop")
PARTICLE_ERRORS = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


class LogJoint:
    """``log p(x, z) + log|J|`` of a model at particles ``u [S, D]``: values ``[S]`` in nats.

    The particles go through the model in one call of `torch.func.vmap`, or one by one in a loop where the
    model does not allow that. The fast way is taken only after it has given the values and the gradients of the
    loop at a few points (`choose`).

    A particle at which the model raises, as a failed Cholesky factorisation does, scores ``-inf``; the others are
    not disturbed.

    Args:
        model: The Pyro model.
        layout: Its latent sites.
        mode: ``"auto"``, ``"vmap"`` or ``"loop"``.
        only: Names of the sites to sum over, ``None`` for all of the model. With the latent sites alone this is
            the log prior.

    Attributes:
        mode: What is used; ``"auto"`` until `choose` has run.
        reason: Why, in words.
    """

    def __init__(
        self,
        model: Model,
        layout: SiteLayout,
        *,
        mode: str = "auto",
        only: tuple[str, ...] | None = None,
    ):
        check_choice("mode", mode, MODES)
        self.model = model
        self.layout = layout
        self.mode = mode
        self.only = only
        self.reason = "asked for" if mode != "auto" else "not chosen yet"
        self._minibatch = Minibatch()
        self._compiled: CompiledScore | None = None

    def __call__(self, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles ``u [S, D]`` with the model's arguments: ``[S]`` in nats."""
        self.choose(u[:3], *args, **kwargs)
        if self._compiled is not None:
            try:
                with unvalidated():
                    return self._score(self._compiled, u, args, kwargs)
            except ModelError as error:
                self._stay_eager(error)
        with unvalidated(), self._minibatch.pinned():
            return self._score(self._vmap if self.mode == "vmap" else self._loop, u, args, kwargs)

    def choose(self, u: Tensor, *args: Any, **kwargs: Any) -> None:
        """Settle ``"auto"`` by comparing values and gradients with the loop at ``u [S, D]``."""
        if self.mode != "auto":
            return
        with unvalidated():
            exact = self._probe(self._loop, u, args, kwargs)
            try:
                fast = self._probe(self._vmap, u, args, kwargs)
            except Exception as error:  # whatever a model does under vmap, the loop is right
                self.reason = f"vmap raised {_first(error)}"
            else:
                if all(_close(a, b) for a, b in zip(fast, exact, strict=True)):
                    self.mode, self.reason = "vmap", "vmap agrees with the loop"
                    return
                self.reason = "vmap and the loop disagree"
        self.mode = "loop"
        warnings.warn(
            f"the model is scored one particle at a time, about 1 ms each ({self.reason})",
            stacklevel=2,
        )

    def compile(self, backend: str, u: Tensor, *args: Any, **kwargs: Any) -> None:
        """Score with a graph from now on (`CompiledScore`), traced and compared at ``u [S, D]``.

        Where that cannot be done the model is scored as before, with a warning that says why.
        """
        self.choose(u, *args, **kwargs)
        try:
            if self.mode != "vmap":
                raise ModelError(f"only what vmap can score can be traced, not mode {self.mode!r}")
            compiled = CompiledScore(
                self._vmap, u, agree=_close, backend=backend, minibatch=self._minibatch
            )
            with unvalidated():
                compiled(u, args, kwargs)
        except ModelError as error:
            self._stay_eager(error)
        else:
            self._compiled = compiled
            self.reason += f"; compiled ({backend}) in {compiled.seconds:.1f} s"

    def _stay_eager(self, error: ModelError) -> None:
        self._compiled = None
        why = str(error).rstrip(".")
        self.reason = f"{self.reason.split(';')[0]}; not compiled: {why}"
        warnings.warn(f"the model is scored without compiling it: {why}", stacklevel=3)

    def one(self, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Score a single particle ``u [D]``: a scalar."""
        values, log_det = self.layout.unpack(u)
        trace = trace_at(self._minibatch(self.model), values, *args, **kwargs)
        scores = [
            node["log_prob_sum"]
            for name, node in trace.nodes.items()
            if "log_prob_sum" in node and (self.only is None or name in self.only)
        ]
        return sum(scores, log_det)

    def loop(self, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles one by one, whatever the mode: ``[S, D]`` to ``[S]``."""
        with unvalidated(), self._minibatch.pinned():
            return self._score(self._loop, u, args, kwargs)

    def describe(self, u: Tensor, *args: Any, **kwargs: Any) -> str:
        """Name the sites of ``u [D]`` whose log density is not finite, with value and score."""
        values, _ = self.layout.unpack(u)
        try:
            with unvalidated():
                trace = trace_at(self.model, values, *args, **kwargs)
        except PARTICLE_ERRORS as error:
            return f"the model raised {_first(error)}"
        return "; ".join(
            f"{name}: log density {node['log_prob_sum'].item()}, value {_short(node['value'])}"
            for name, node in trace.nodes.items()
            if "log_prob_sum" in node and not node["log_prob_sum"].isfinite()
        )

    def _score(self, run: Run, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Score all particles; where the model raises, halve until the culprits stand alone."""
        try:
            return run(u, args, kwargs)
        except ModelError:  # of the model as a whole
            raise
        except PARTICLE_ERRORS:
            if len(u) == 1:
                return u.new_full((1,), -torch.inf)
            return torch.cat([self._score(run, half, args, kwargs) for half in u.tensor_split(2)])

    def _vmap(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores: Tensor = torch.func.vmap(lambda v: self.one(v, *args, **kwargs), randomness="same")(
            u
        )
        return scores

    def _loop(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores = []
        state = torch.get_rng_state()
        for v in u:
            torch.set_rng_state(state)  # one minibatch for all particles, as under vmap
            with self._minibatch.pinned():
                scores.append(self.one(v, *args, **kwargs))
        return torch.stack(scores)

    def _probe(
        self, run: Run, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Values ``[S]`` and gradients ``[S, D]``, with the same random choices for every way of running."""
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            self._minibatch.pinned(),
        ):
            torch.manual_seed(0)
            v = u.detach().requires_grad_()
            scores = run(v, args, kwargs)
            (grad,) = torch.autograd.grad(scores.sum(), v)
        return scores.detach(), grad


def trace_at(model: Model, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Pyro trace of ``model`` with its latent sites fixed to ``values``, every ``log_prob_sum`` computed."""
    with poutine.block():
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, node: not site_is_subsample(node))
    return trace


class _Unvalidated(Messenger):
    """Turns argument checks off in distributions that were built before the checks were turned off."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        while fn is not None:
            if fn.__dict__.get("_validate_args"):
                fn._validate_args = False
                self.changed.append(fn)
            fn = fn.__dict__.get("base_dist")

    def __enter__(self) -> Any:
        self.changed: list[Any] = []
        return super().__enter__()

    def __exit__(self, *exc: Any) -> Any:
        for fn in self.changed:
            fn._validate_args = True
        return super().__exit__(*exc)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Run model code without argument checks: they branch on values, which a batch of particles cannot."""
    with pyro.validation_enabled(False), _Unvalidated():
        yield


class _FreshNoise(TorchFunctionMode):
    """Draws in-place noise out of place, so that under vmap every particle gets its own."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ and len(args) == 1 and not kwargs:
            return torch.randn(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        if func in (Tensor.exponential_, Tensor.cauchy_) and len(args) == 1 and not kwargs:
            uniform = torch.rand(args[0].shape, dtype=args[0].dtype, device=args[0].device)
            if func is Tensor.exponential_:
                return -torch.log1p(-uniform)
            return torch.tan(torch.pi * (uniform - 0.5))
        return func(*args, **kwargs)


class ModelPrior(Distribution):
    """The prior of a model on its unconstrained vector ``u [D]``: drawn by running it, scored by `LogJoint`.

    Args:
        log_prior: The model's log joint over its latent sites only.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        like: A tensor ``[D]`` that gives dtype and device.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(
        self, log_prior: LogJoint, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor
    ):
        super().__init__(event_shape=torch.Size([log_prior.layout.dim]), validate_args=False)
        self._log_prior = log_prior
        self._args = args
        self._kwargs = kwargs
        self._like = like
        self._loops = False

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Run the model forward: ``u [*sample_shape, D]``."""
        count = torch.Size(sample_shape).numel()
        with torch.no_grad(), unvalidated():
            return self._draw(count).reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log prior density of ``value [..., D]`` in nats, ``log|J|`` included: ``[...]``."""
        flat = value.reshape(-1, *self.event_shape)
        return self._log_prior(flat, *self._args, **self._kwargs).reshape(value.shape[:-1])

    def _draw(self, count: int) -> Tensor:
        if not self._loops:
            try:
                blank = self._like.new_zeros(count)
                with _FreshNoise():
                    draws: Tensor = torch.func.vmap(self._draw_one, randomness="different")(blank)
                return draws
            except (
                RuntimeError
            ) as error:  # a sampler that cannot be batched, such as a rejection loop
                self._loops = True
                warnings.warn(
                    f"the prior is drawn one particle at a time, about 1 ms each ({_first(error)})",
                    stacklevel=2,
                )
        return torch.stack([self._draw_one(self._like.new_zeros(())) for _ in range(count)])

    def _draw_one(self, blank: Tensor) -> Tensor:
        layout = self._log_prior.layout
        try:
            with poutine.block():
                trace = poutine.trace(self._log_prior.model).get_trace(*self._args, **self._kwargs)
        except NotImplementedError as error:
            raise ModelError(
                "the prior contrast needs a prior that can be sampled, and a site cannot",
                got=str(error),
                do="Use contrast='gaussian' or 'flow'.",
            ) from error
        values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in layout.names}
        return layout.pack(values) + blank


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-8 if a.dtype == torch.float64 else 2e-4
    scale = b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1.0).item()
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _first(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _short(value: Any) -> str:
    if not isinstance(value, Tensor) or value.numel() <= 8:
        return str(value.tolist() if isinstance(value, Tensor) else value)
    bad = (~value.isfinite()).sum().item()
    return (
        f"{tuple(value.shape)} with {bad} non-finite entries, first {value.flatten()[:4].tolist()}"
    )
