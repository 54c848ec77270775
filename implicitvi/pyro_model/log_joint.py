"""Score a Pyro model at many particles at once."""

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
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.compiled import CompiledScore
from implicitvi.pyro_model.enumeration import FALLBACK, Enumerate, batchable, is_enumerated, log_sum
from implicitvi.pyro_model.gradient_check import check_gradient
from implicitvi.pyro_model.plates import by_datum
from implicitvi.pyro_model.sites import SiteLayout, bijection
from implicitvi.pyro_model.subsampling import PinnedSubsample, own_minibatches, rewind, seeded
from implicitvi.pyro_model.tracing import (
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

Run = Callable[[Tensor, Arguments], Tensor]
MODES = ("auto", "vmap", "plate", "loop")
CACHED = 400_000  # entries of a site's tensor that a CPU still computes fastest at once
WIDE = 64  # points at which vmap and the plate are compared
FAST = {"vmap": "vmap", "plate": "the particle plate"}


class LogJoint:
    """A scorer of ``log p(x, z) + log|J|`` at particles ``u [S, D]``: values ``[S]`` in nats.

    The particles go through the model together, under `torch.func.vmap` or in a `pyro.plate` of particles, or one by
    one where the model allows neither. A fast mode is used only after it has given the values and gradients of the
    loop at a few points (`choose`). Discrete sites marked ``infer={"enumerate": "parallel"}`` are summed out. A
    particle at which the model raises, as where a Cholesky factorisation fails, scores ``-inf``; the others are scored.

    Args:
        model: The Pyro model.
        layout: Its continuous latent sites.
        mode: ``"auto"``, ``"vmap"``, ``"plate"`` or ``"loop"``.
        only: Names of the sites to sum over, ``None`` for all: the latent sites alone give the log prior. Enumerated
            sites always count.
        exclude: Names of sites to leave out of the sum; their densities are not computed.
        plate: Name of a plate whose elements are scored one by one, without its weight: ``[S, 1 + B]`` (`by_datum`).

    Attributes:
        mode: The mode in use; ``"auto"`` until `choose` has run.
        reason: The reason for it, in words.
        own_minibatches: Size, 0 if unknown, and minibatch size of plates and sites whose data the model draws itself.
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
        self.model, self.layout, self.mode = model, layout, mode
        self.only, self.exclude, self.plate = only, exclude, plate
        self._shape = () if plate is None else (1 + layout.plate_size(plate),)
        self.reason = "not chosen yet" if mode == "auto" else "asked for"
        self._is_chosen = False
        self._agreeing: list[str] = []  # the fast modes that give the values of the loop
        self._shapes = {site.name: site.shape for site in layout.sites}
        self._nesting: int | None = None  # the depth of batch dimensions; `_inspect` finds it and the next two
        self._enumerates, self._width = False, 1
        self._falls_back = False  # vmap loops inside an operation, of which torch would warn in every call
        self._minibatch = PinnedSubsample()
        self.own_minibatches: dict[str, tuple[int, int]] = {}
        self._compiled: CompiledScore | None = None

    def __call__(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles ``u [S, D]`` with the model's arguments: ``[S]`` in nats."""
        self.choose(u, *args, **kwargs)
        call, graph = Arguments(args, kwargs), self._compiled
        if graph is not None:
            try:
                with unvalidated():
                    return self._score(lambda u, call: graph(u, call.args, call.kwargs), u, call)
            except ModelError as error:
                self._stay_eager(error)
        with unvalidated(), self._minibatch.pinned():
            return self._score(self._run(self.mode), u, call)

    def choose(self, u: Tensor, /, *args: Any, **kwargs: Any) -> None:
        """Check the model, and the modes of scoring it, near the first points of ``u [S, D]``; the first time only.

        ``"auto"`` becomes the plate, the faster mode, if it and vmap give the values and gradients of the loop and also
        agree at points far apart, so that no particles are mixed up; else the first mode that fits.

        Raises:
            ModelError: Sites differ from the layout, the support of one depends on another, or the mode is wrong here.
        """
        if self._is_chosen:
            return
        call, asked, failures = Arguments(args, kwargs), self.mode, []
        self._agreeing = []
        with unvalidated(), RandomStream(0):
            points, exact = self._exact_points(u, call)
            self._watch(points, call)
            for mode in FAST if asked == "auto" else {asked} & FAST.keys():
                failure = self._failure(mode, points, exact, call)
                if failure is not None:
                    failures.append(failure)
                elif mode == asked or not self._agreeing or self._same_far_out(u, call):
                    self._agreeing.append(mode)
            reason = "; ".join(failures)
            if self._agreeing:
                self.mode = self._agreeing[-1]
                names = " and ".join(FAST[mode] for mode in self._agreeing)
                self.reason = f"{names} agree{'s' * (len(self._agreeing) == 1)} with the loop"
            elif asked in FAST:
                raise ModelError.must_be(f"mode={asked!r}", "a mode that fits the model", reason, "Use mode='auto'.")
            else:
                self.mode, self.reason = "loop", reason or "asked for"
            run = partial(self._score, self._run(self.mode))
            check_gradient(lambda u: self._probe(run, u, call), points, exact, self.layout)
        self._is_chosen = True
        if self.mode == "loop" != asked:
            warnings.warn(f"the model is scored one particle at a time, about 1 ms each ({self.reason})", stacklevel=2)

    def compile(self, backend: str, u: Tensor, /, *args: Any, **kwargs: Any) -> None:
        """Trace the model at ``u [S, D]`` and score with the graph (`CompiledScore`), or warn why there can be none."""
        self.choose(u, *args, **kwargs)
        try:
            if not self.vmaps:
                raise ModelError(f"mode must be 'vmap' to be traced, got {self.mode!r}.")
            with unvalidated(), RandomStream(0):
                points, _ = self._exact_points(u, Arguments(args, kwargs))
                self._compiled = CompiledScore(
                    lambda u, *call: self._batched(u, Arguments(*call)), points, _close, backend, self._minibatch
                )
                self._compiled(points, args, kwargs)
        except ModelError as error:
            self._stay_eager(error)
        else:
            self.reason += f"; compiled ({backend}) in {self._compiled.seconds:.1f} s"

    def _stay_eager(self, error: ModelError) -> None:
        self._compiled = None
        why = str(error).rstrip(".")
        self.reason = f"{self.reason.split('; compiled')[0]}; not compiled: {why}"
        warnings.warn(f"the model is scored without compiling it: {why}", stacklevel=3)

    @property
    def vmaps(self) -> bool:
        """True if vmap gives the values of the loop, whatever mode is in use."""
        return "vmap" in self._agreeing

    @property
    def minibatches(self) -> dict[str, tuple[int, int]]:
        """Size and minibatch size of every subsampled plate that the model has shown, by name; the model's own too."""
        return self.own_minibatches | {name: plate[:2] for name, plate in self._minibatch.plates.items()}

    def one(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score a single particle ``u [D]``: a scalar."""
        values, log_dets = self.layout.unpack_each(u)
        trace = self._trace(values, Arguments(args, kwargs))
        if self.plate is not None:
            return by_datum(trace, log_dets, self.plate)
        log_det = sum((each.sum() for each in log_dets.values()), u.new_zeros(()))
        if self._enumerates:
            return log_det + log_sum(trace)
        return sum((node["log_prob_sum"] for node in trace.nodes.values() if "log_prob_sum" in node), log_det)

    def loop(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles one by one, in any mode: ``[S, D]`` to ``[S]``."""
        with unvalidated(), self._minibatch.pinned():
            return self._score(self._loop, u, Arguments(args, kwargs))

    def vmap(self, u: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        """Score particles ``u [S, D]`` together, unchecked; for use under another `torch.func.vmap`."""
        return self._vmap(u, Arguments(args, kwargs))

    def _trace(self, values: dict[str, Tensor], call: Arguments, model: Model | None = None) -> Any:
        """Trace the model, or ``model`` made from it, check its sites and score those that count."""
        model = model or self.model
        if self._nesting is None:
            self._inspect(values, call)
        if self._enumerates:
            model = Enumerate(-1 - self._nesting)(model)  # type: ignore[operator]
        trace = run_at(self._minibatch(model), values, *call.args, **call.kwargs)
        check_sites(trace, self._shapes, wider=self._enumerates or model is not self.model)
        left_out = set(self.exclude)
        if self.only is not None:
            left_out |= {name for name, node in trace.nodes.items() if name not in self.only and not is_summed(node)}
        score(trace, values, left_out)
        return trace

    def _inspect(self, values: dict[str, Tensor], call: Arguments) -> None:
        """Run the model once to see its discrete sites, how deep its plates are nested, and its largest site."""
        with RandomStream(0):
            trace = run_at(self.model, values, *call.args, **call.kwargs)
        nodes = [node for node in trace.nodes.values() if is_scored(node)]
        self._enumerates = any(map(is_enumerated, nodes))
        undeclared = [] if self._enumerates else [len(node["fn"].batch_shape) for node in nodes]
        self._nesting = max([plate_nesting(nodes), *undeclared])
        self._width = max((node["value"].numel() for node in nodes), default=1)

    def _run(self, mode: str) -> Run:
        return {"vmap": self._vmap, "plate": self._plate, "loop": self._loop}[mode]

    def _score(self, run: Run, u: Tensor, call: Arguments, *, whole: bool = True) -> Tensor:
        """Score all particles; where the model raises, halve until the particles at fault stand alone."""
        try:
            return run(u, call)
        except Exception as error:
            if not is_particles_fault(error):
                raise
            if len(u) == 1:
                return u.new_full((1, *self._shape), -torch.inf)
            scores = torch.cat([self._score(run, half, call, whole=False) for half in u.tensor_split(2)])
            if whole and isinstance(error, ValueError) and not scores.isfinite().any():  # the values are not the reason
                advice = "Call it with these arguments to see the error. Data of another size need a new guide."
                message = f"The model must run at some values of its latents, got {first_line(error)}. {advice}"
                raise ModelError(message, faq="sites-or-shapes-have-changed") from error
            return scores

    def _vmap(self, u: Tensor, call: Arguments) -> Tensor:
        """Score all particles by vmap, so many at a time that the largest site stays in the processor's cache."""
        return self._batched(u, call, ceil(len(u) / self._parts(u)) or None)

    def _parts(self, u: Tensor) -> int:
        """Return the number of parts of ``u [S, D]`` whose largest site each stays in the processor's cache."""
        return max(ceil(len(u) * self._width / CACHED), 1) if u.is_cpu else 1

    def _batched(self, u: Tensor, call: Arguments, chunk_size: int | None = None) -> Tensor:
        with batchable(quiet=self._falls_back):
            scores: Tensor = torch.func.vmap(
                lambda v: self.one(v, *call.args, **call.kwargs), randomness="same", chunk_size=chunk_size
            )(u)
        return scores

    def _plate(self, u: Tensor, call: Arguments) -> Tensor:
        if self._enumerates:
            raise NotImplementedError("it does not sum discrete sites out")
        if self.plate is not None:
            raise NotImplementedError("it does not score data one by one")
        parts = self._parts(u)
        if parts == 1:
            return self._together(u, call)
        scores, set_back = [], rewind()
        for part in u.tensor_split(parts):
            set_back()
            scores.append(self._together(part, call))
        return torch.cat(scores)

    def _together(self, u: Tensor, call: Arguments) -> Tensor:
        values, log_det = self.layout.unpack(u)
        depth = self._nesting or 0
        for site in self.layout.sites:
            shape = (len(u), *[1] * (depth - site.batch_dim), *site.shape)
            values[site.name] = values[site.name].reshape(shape)

        def together(*args: Any, **kwargs: Any) -> None:
            with pyro.plate("_particles", len(u), dim=-1 - depth):
                self.model(*args, **kwargs)

        scores = log_det
        for name, node in self._trace(values, call, together).nodes.items():
            if "log_prob" in node:
                log_prob = node["log_prob"]
                if log_prob.dim() != depth + 1 or len(log_prob) != len(u):
                    raise ValueError(f"the log density of {name!r} has shape {tuple(log_prob.shape)}")
                scores = scores + (log_prob.flatten(1).sum(1) if depth else log_prob)
        return scores

    def _loop(self, u: Tensor, call: Arguments) -> Tensor:
        scores, set_back = [], rewind()
        for v in u:
            set_back()  # one minibatch for all particles, as under vmap
            with self._minibatch.pinned():
                scores.append(self.one(v, *call.args, **call.kwargs))
        return torch.stack(scores)

    def _exact_points(self, u: Tensor, call: Arguments) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return points ``[P, D]`` near ``u [S, D]`` where the loop is finite, and its values and gradients there."""
        near = u[:3].detach()
        for scale in (0.5, 0.05, 0.005):
            with RandomStream(0):
                noise = torch.randn(4, u.shape[1]).to(u)
            points = torch.cat([near, near[torch.arange(4) % len(near)] + scale * noise])
            for v in points:
                _check_supports(self.layout, lambda values: self._trace(values, call), v)
            values, gradients = self._probe(partial(self._score, self._loop), points, call)
            finite = finite_draws(values) & gradients.isfinite().all(-1)
            if finite.sum() > 1:  # a single point would not show particles that the model mixes up
                break
        return points[finite], (values[finite], gradients[finite])

    def _watch(self, points: Tensor, call: Arguments) -> None:
        """Run the model twice at the first of points ``[P, D]`` to see whether it draws minibatches of its own."""
        if len(points):
            values, _ = self.layout.unpack(points[0])
            with torch.no_grad(), self._minibatch.pinned():
                self.own_minibatches = own_minibatches(self._trace(values, call), self._trace(values, call))

    def _failure(self, mode: str, points: Tensor, exact: tuple[Tensor, Tensor], call: Arguments) -> str | None:
        """Return why a fast mode cannot be used; ``None`` if it gives the values of the loop."""
        if len(points) < 2:
            return "the density is finite at too few points to compare"
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fast = self._probe(self._run(mode), points, call)
            self._falls_back = any(FALLBACK in str(w.message) for w in caught)
        except Exception as error:  # whatever a model does in a batch, the loop is right
            return f"{FAST[mode]} raised {first_line(error)}"
        return None if _agree(fast, exact) else f"{FAST[mode]} and the loop disagree"

    def _same_far_out(self, u: Tensor, call: Arguments) -> bool:
        """Return whether vmap and plate agree far from ``u [S, D]`` too."""
        with torch.no_grad(), self._minibatch.pinned():
            return _same_far_out(partial(self._vmap, call=call), partial(self._together, call=call), u)

    def _probe(self, run: Run, u: Tensor, call: Arguments) -> tuple[Tensor, Tensor]:
        """Return values ``[S]`` and gradients ``[S, D]``, with the same random choices in every mode."""
        with torch.enable_grad(), RandomStream(0), seeded(), self._minibatch.pinned():
            v = u.detach().requires_grad_()
            scores = run(v, call)
            (grad,) = torch.autograd.grad(scores.sum() + 0 * v.sum(), v)
        return scores.detach(), grad


def _check_supports(layout: SiteLayout, trace_at: Callable[[dict[str, Tensor]], Any], u: Tensor) -> None:
    """Raise `ModelError` unless the support of every site at ``u [D]`` is that of the layout."""
    values, _ = layout.unpack(u)
    try:
        trace = trace_at(values)
    except Exception as error:
        if not is_particles_fault(error):
            raise
        return
    for site, flat in layout.split(u):
        here, there = bijection(site.name, trace.nodes[site.name]["fn"])(site.unflatten(flat)), values[site.name]
        same_shape = here.shape[here.dim() - there.dim() :] == there.shape  # enumerated values come in front
        if not same_shape or not torch.allclose(here, there.expand_as(here)):
            message = f"The support of site {site.name!r} must not depend on other latents. Sample a site of fixed "
            message += "support and scale it: b times Uniform(0, 1) for Uniform(0, b)."
            raise ModelError(message, faq="a-site-cannot-be-mapped-to-the-real-line")


def _same_far_out(vmap: Callable[[Tensor], Tensor], plate: Callable[[Tensor], Tensor], u: Tensor) -> bool:
    """Return whether two ways of scoring agree far from ``u [S, D]`` too, where an ``any()`` of particles shows."""
    with RandomStream(0):
        noise = torch.randn(WIDE, u.shape[1]).to(u) * torch.logspace(-1, 1, WIDE).to(u)[:, None]
    points = u[torch.arange(WIDE) % min(len(u), 3)].detach() + noise
    try:
        with RandomStream(0), seeded():
            each = vmap(points)
        with RandomStream(0), seeded():
            together = plate(points)
    except Exception:  # whatever a model does in a batch
        return False
    finite = each.isfinite()
    return bool((finite == together.isfinite()).all()) and _close(together[finite], each[finite])


def _agree(fast: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> bool:
    """Return whether values ``[S, ...]`` and gradients ``[S, D]`` are equal to rounding, relative to each particle."""
    return _close(*(torch.cat([v.reshape(len(v), -1), g], 1) for v, g in (fast, exact)))


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether ``a [S, ...]`` is ``b`` to rounding, relative to each particle."""
    tolerance = 1e-8 if b.dtype == torch.float64 else 1e-4
    b = b.reshape(len(b), -1)
    scale = b.abs().amax(1, keepdim=True).clamp(min=1.0)
    return bool(((a.reshape(b.shape) - b).abs() <= tolerance * scale).all())
