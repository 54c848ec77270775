"""The log joint density of a Pyro model at many particles at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import pyro
import torch
from torch import Tensor

from implicitvi.errors import ModelError, check_choice
from implicitvi.numerics.optimise import finite_draws
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.compiled import CompiledScore
from implicitvi.pyro_model.enumeration import FALLBACK, Enumerate, batchable, is_enumerated, log_sum
from implicitvi.pyro_model.plates import by_datum
from implicitvi.pyro_model.sites import SiteLayout, bijection
from implicitvi.pyro_model.subsampling import PinnedSubsample
from implicitvi.pyro_model.tracing import (
    PARTICLE_ERRORS,
    check_sites,
    first_line,
    is_particles_fault,
    is_scored,
    is_summed,
    plate_nesting,
    run_at,
    score,
    unvalidated,
)
from implicitvi.rng import RandomStream

Run = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
MODES = ("auto", "vmap", "plate", "loop")
CACHED = 400_000  # entries of a site's tensor that are still worth computing at once on a CPU
FAST = {"vmap": "vmap", "plate": "the particle plate"}


class LogJoint:
    """``log p(x, z) + log|J|`` of a model at particles ``u [S, D]``: values ``[S]`` in nats.

    The particles go through the model together, under `torch.func.vmap` or in a `pyro.plate` of particles, or one by
    one in a loop where the model allows neither. A fast way is taken only after it has given the values and the
    gradients of the loop at a few points (`choose`).

    Discrete sites marked ``infer={"enumerate": "parallel"}`` are summed out. A particle at which the model raises,
    as a failed Cholesky factorisation does, scores ``-inf``; the others are not disturbed.

    Args:
        model: The Pyro model.
        layout: Its continuous latent sites.
        mode: ``"auto"``, ``"vmap"``, ``"plate"`` or ``"loop"``.
        only: Names of the sites to sum over, ``None`` for all of the model. With the latent sites alone this is
            the log prior. Enumerated sites always count.
        exclude: Names of sites to leave out of the sum; their densities are not asked for.
        plate: Name of a plate whose elements are scored one by one beside the rest, its weight taken out: values are
            ``[S, 1 + B]`` then (`by_datum`).

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
        exclude: tuple[str, ...] = (),
        plate: str | None = None,
    ):
        check_choice("mode", mode, MODES)
        self.model = model
        self.layout = layout
        self.mode = mode
        self.only = only
        self.exclude = exclude
        self.plate = plate
        self._shape = () if plate is None else (1 + layout.plate_size(plate),)
        self.reason = "not chosen yet" if mode == "auto" else "asked for"
        self._is_settled = False
        self._shapes = {site.name: site.shape for site in layout.sites}
        # What the first run of the model shows: depth of its batch dimensions, and whether sites are summed out.
        self._nesting: int | None = None
        self._enumerates = False
        self._width = 1  # entries of its largest site
        # Whether vmap loops inside an operation, of which torch would warn in every call.
        self._falls_back = False
        self._minibatch = PinnedSubsample()
        self._compiled: CompiledScore | None = None

    def __call__(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles ``u [S, D]`` with the model's arguments: ``[S]`` in nats."""
        self.choose(u, *args, **kwargs)
        if self._compiled is not None:
            try:
                with unvalidated():
                    return self._score(self._compiled, u, args, kwargs)
            except ModelError as error:
                self._stay_eager(error)
        with unvalidated(), self._minibatch.pinned():
            return self._score(self._run(self.mode), u, args, kwargs)

    def choose(self, u: Tensor, /, *args: Any, **kwargs: Any) -> None:
        """Check the model, and the ways to score it, near the first points of ``u [S, D]``; once only.

        ``"auto"`` becomes the first of vmap, plate and loop that gives the values and gradients of the loop.

        Raises:
            ModelError: The model's sites are not those of the layout, the support of one depends on another, or the
                mode asked for does not give what the loop gives.
        """
        if self._is_settled:
            return
        with unvalidated(), RandomStream(0):
            points, exact = self._compare_at(u, args, kwargs)
            asked, failures = self.mode, []
            for mode in FAST if asked == "auto" else {asked} & FAST.keys():
                failure = self._failure(mode, points, exact, args, kwargs)
                if failure is None:
                    self._settle(mode, f"{FAST[mode]} agrees with the loop")
                    return
                failures.append(failure)
        reason = "; ".join(failures)
        if asked in FAST:
            raise ModelError(f"mode={asked!r} does not fit the model", got=reason, do="Use mode='auto'.")
        self._settle("loop", reason or "asked for")
        if asked == "auto":
            warnings.warn(f"the model is scored one particle at a time, about 1 ms each ({reason})", stacklevel=2)

    def compile(self, backend: str, u: Tensor, /, *args: Any, **kwargs: Any) -> None:
        """Score with a graph from now on (`CompiledScore`), traced and compared at ``u [S, D]``.

        Where that cannot be done the model is scored as before, with a warning that says why.
        """
        self.choose(u, *args, **kwargs)
        try:
            if self.mode != "vmap":
                raise ModelError(f"only what vmap can score can be traced, not mode {self.mode!r}")
            with unvalidated(), RandomStream(0):  # a look that leaves no trace
                points, _ = self._compare_at(u, args, kwargs)
                compiled = CompiledScore(self._whole, points, agree=_close, backend=backend, minibatch=self._minibatch)
                compiled(points, args, kwargs)
        except ModelError as error:
            self._stay_eager(error)
        else:
            self._compiled = compiled
            self.reason += f"; compiled ({backend}) in {compiled.seconds:.1f} s"

    def _stay_eager(self, error: ModelError) -> None:
        self._compiled = None
        why = str(error).rstrip(".")
        self.reason = f"{self.reason.split('; compiled')[0]}; not compiled: {why}"
        warnings.warn(f"the model is scored without compiling it: {why}", stacklevel=3)

    @property
    def minibatches(self) -> dict[str, tuple[int, int]]:
        """Size and minibatch of every subsampled plate that the model has shown, by name."""
        plates = self._minibatch.plates.items()
        return {name: (size, subsample_size) for name, (size, subsample_size, _) in plates}

    def one(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score a single particle ``u [D]``: a scalar."""
        values, log_dets = self.layout.unpack_each(u)
        trace = self._trace(values, args, kwargs)
        if self.plate is not None:
            return by_datum(trace, log_dets, self.plate)
        log_det = sum((each.sum() for each in log_dets.values()), u.new_zeros(()))
        if self._enumerates:
            return log_det + log_sum(trace)
        return sum((n["log_prob_sum"] for n in trace.nodes.values() if "log_prob_sum" in n), log_det)

    def loop(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles one by one, whatever the mode: ``[S, D]`` to ``[S]``."""
        with unvalidated(), self._minibatch.pinned():
            return self._score(self._loop, u, args, kwargs)

    def describe(self, u: Tensor, /, *args: Any, **kwargs: Any) -> str:
        """Name the sites of ``u [D]`` whose log density is not finite, with value and score."""
        values, _ = self.layout.unpack(u)
        try:
            with unvalidated():
                trace = run_at(self.model, values, *args, **kwargs)
                score(trace, values, self.exclude)
        except PARTICLE_ERRORS as error:
            return f"the model raised {first_line(error)}"
        return "; ".join(
            f"{name}: log density {node['log_prob_sum'].item()}, value {_short(node['value'])}"
            for name, node in trace.nodes.items()
            if "log_prob_sum" in node and not node["log_prob_sum"].isfinite()
        )

    def _trace(
        self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], model: Model | None = None
    ) -> Any:
        """Trace of the model, or of ``model`` made from it, its sites checked and those that count scored."""
        model = self.model if model is None else model
        if self._nesting is None:
            self._inspect(values, args, kwargs)
        if self._enumerates:
            model = Enumerate(-1 - self._nesting)(model)  # type: ignore[operator]
        trace = run_at(self._minibatch(model), values, *args, **kwargs)
        check_sites(trace, self._shapes, wider=self._enumerates or model is not self.model)
        left_out = self.exclude
        if self.only is not None:
            kept = {*self.only, *(k for k, n in trace.nodes.items() if is_summed(n))}
            left_out = tuple(name for name in trace.nodes if name not in kept or name in left_out)
        score(trace, values, left_out)
        return trace

    def _inspect(self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the model once to see its discrete sites, how deep its plates are nested, and its largest site."""
        with RandomStream(0):  # a look that leaves no trace
            trace = run_at(self.model, values, *args, **kwargs)
        nodes = [node for node in trace.nodes.values() if is_scored(node)]
        self._enumerates = any(is_enumerated(node) for node in nodes)
        undeclared = [] if self._enumerates else [len(node["fn"].batch_shape) for node in nodes]
        self._nesting = max([plate_nesting(nodes), *undeclared])
        self._width = max((node["value"].numel() for node in nodes), default=1)

    def _check_supports(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `ModelError` unless the support of every site at ``u [D]`` is that of the layout."""
        values, _ = self.layout.unpack(u)
        try:
            trace = self._trace(values, args, kwargs)
        except PARTICLE_ERRORS as error:
            if not is_particles_fault(error):
                raise
            return
        for site, flat in self.layout.split(u):
            fn = trace.nodes[site.name]["fn"]
            here = bijection(site.name, fn)(site.unflatten(flat))
            if not _same(here, values[site.name]):
                raise ModelError(
                    f"the support of site {site.name!r} depends on other latent sites",
                    do="Sample a site of fixed support and transform it: for Uniform(0, b) sample "
                    "Uniform(0, 1) and multiply by b.",
                    faq="a-site-cannot-be-mapped-to-the-real-line",
                )

    def _run(self, mode: str) -> Run:
        return {"vmap": self._vmap, "plate": self._plate, "loop": self._loop}[mode]

    def _score(
        self, run: Run, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool = True
    ) -> Tensor:
        """Score all particles; where the model raises, halve until the culprits stand alone.

        Raises:
            ModelError: The model objects, by a ``ValueError``, to every one of the batch: their values are not why.
        """
        try:
            return run(u, args, kwargs)
        except PARTICLE_ERRORS as error:
            if not is_particles_fault(error):
                raise
            if len(u) == 1:
                return u.new_full((1, *self._shape), -torch.inf)
            halves = u.tensor_split(2)
            scores = torch.cat([self._score(run, h, args, kwargs, whole=False) for h in halves])
            if whole and isinstance(error, ValueError) and not scores.isfinite().any():
                raise ModelError(
                    "the model raises an error whatever the values of its latents",
                    got=first_line(error),
                    do="Call it with these arguments. Data of another size than at first ask for a new guide.",
                    faq="sites-or-shapes-have-changed",
                ) from error
            return scores

    def vmap(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles ``u [S, D]`` together, without choice or guard; for use under another `torch.func.vmap`."""
        return self._vmap(u, args, kwargs)

    def _vmap(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """All particles, so many at a time that the largest site stays in the processor's cache."""
        parts = ceil(len(u) * self._width / CACHED) if u.is_cpu else 1
        return self._whole(u, args, kwargs, chunk_size=ceil(len(u) / max(parts, 1)) or None)

    def _whole(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], chunk_size: int | None = None) -> Tensor:
        with batchable(quiet=self._falls_back):
            scores: Tensor = torch.func.vmap(
                lambda v: self.one(v, *args, **kwargs), randomness="same", chunk_size=chunk_size
            )(u)
        return scores

    def _plate(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._enumerates:
            raise NotImplementedError("discrete sites are not summed out in it")
        if self.plate is not None:
            raise NotImplementedError("data are not scored one by one in it")
        flat, log_det = self.layout.unpack(u)
        depth: int = self._nesting or 0
        values = {
            site.name: flat[site.name].reshape(len(u), *[1] * (depth - site.batch_dim), *site.shape)
            for site in self.layout.sites
        }

        def together(*args: Any, **kwargs: Any) -> None:
            with pyro.plate("_particles", len(u), dim=-1 - depth):
                self.model(*args, **kwargs)

        scores = log_det
        for name, node in self._trace(values, args, kwargs, together).nodes.items():
            if "log_prob" in node:
                log_prob = node["log_prob"]
                if log_prob.dim() != depth + 1 or len(log_prob) != len(u):
                    raise ValueError(f"the log density of {name!r} has shape {tuple(log_prob.shape)}")
                scores = scores + log_prob.flatten(1).sum(1) if depth else scores + log_prob
        return scores

    def _loop(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        scores = []
        state = torch.get_rng_state()
        for v in u:
            torch.set_rng_state(state)  # one minibatch for all particles, as under vmap
            with self._minibatch.pinned():
                scores.append(self.one(v, *args, **kwargs))
        return torch.stack(scores)

    def _settle(self, mode: str, reason: str) -> None:
        self.mode, self.reason, self._is_settled = mode, reason, True

    def _compare_at(
        self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Points near ``u [S, D]`` at which the loop is finite, ``[P, D]``, and its values and gradients there.

        Few of many candidates would do; a single one would not show particles that meet each other.
        """
        near = u[:3].detach()
        for scale in (0.5, 0.05, 0.005):
            with RandomStream(0):
                noise = torch.randn(4, u.shape[1]).to(u)
            points = torch.cat([near, near[torch.arange(4) % len(near)] + scale * noise])
            for v in points:
                self._check_supports(v, args, kwargs)
            values, gradients = self._probe(partial(self._score, self._loop), points, args, kwargs)
            finite = finite_draws(values) & gradients.isfinite().all(-1)
            if finite.sum() > 1:
                break
        return points[finite], (values[finite], gradients[finite])

    def _failure(
        self, mode: str, points: Tensor, exact: tuple[Tensor, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why a fast mode cannot be taken; ``None`` if it gives what the loop gives."""
        if len(points) < 2:
            return "the density is finite at too few points to compare"
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fast = self._probe(self._run(mode), points, args, kwargs)
            self._falls_back = any(FALLBACK in str(w.message) for w in caught)
        except Exception as error:  # whatever a model does in a batch, the loop is right
            return f"{FAST[mode]} raised {first_line(error)}"
        return None if _agree(fast, exact) else f"{FAST[mode]} and the loop disagree"

    def _probe(self, run: Run, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Values ``[S]`` and gradients ``[S, D]``, with the same random choices for every way of running."""
        with torch.enable_grad(), RandomStream(0), self._minibatch.pinned():
            v = u.detach().requires_grad_()
            scores = run(v, args, kwargs)
            (grad,) = torch.autograd.grad(scores.sum() + 0 * v.sum(), v)
        return scores.detach(), grad


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two values agree where one may have further dimensions on the left."""
    return a.shape[a.dim() - b.dim() :] == b.shape and torch.allclose(a, b.expand_as(a))


def _agree(fast: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> bool:
    """Whether values ``[S, ...]`` and gradients ``[S, D]`` are the same to rounding, by each particle's measure."""
    return _close(*(torch.cat([v.reshape(len(v), -1), g], 1) for v, g in (fast, exact)))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether ``a [S, ...]`` is ``b`` to rounding, each particle by its own measure."""
    tolerance = 1e-8 if b.dtype == torch.float64 else 1e-4
    b = b.reshape(len(b), -1)
    scale = b.abs().amax(1, keepdim=True).clamp(min=1.0)
    return bool(((a.reshape(b.shape) - b).abs() <= tolerance * scale).all())


def _short(value: Any) -> str:
    if not isinstance(value, Tensor) or value.numel() <= 8:
        return str(value.tolist() if isinstance(value, Tensor) else value)
    bad = (~value.isfinite()).sum().item()
    return f"{tuple(value.shape)} with {bad} non-finite entries, first {value.flatten()[:4].tolist()}"
