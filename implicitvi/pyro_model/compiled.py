"""A batched log density as one graph of tensor operations: traced once, then run without the model's own code.

Scoring a Pyro model costs the same time for one particle as for a thousand, most of it in Python. A graph of values
and gradients leaves that behind: `torch.fx` records it, and PyTorch's compiler may turn it into machine code.

Every tensor among the model's arguments is an input of the graph, so that new data of the same shapes are seen; other
arguments, shapes, dtypes and devices decide which graph is used. A tensor that the model reaches otherwise, as a
global or an attribute, is read where it was at tracing: changes in place are seen, another tensor under the
same name is not. The indices of subsampled plates are inputs too, drawn afresh for every call and shared by all
particles.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from implicitvi.errors import ModelError, OptionError, check_choice
from implicitvi.pyro_model.subsampling import PinnedSubsample

BACKENDS = ("graph", "inductor")
MAX_GRAPHS = 8
Score = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
Pair = tuple[Tensor, ...]


def check_compile(backend: str | None) -> None:
    """Raise `OptionError` unless ``backend`` is ``None`` or one of `BACKENDS` that works on this machine."""
    if backend is None:
        return
    check_choice("compile", backend, BACKENDS)
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    if backend == "inductor" and not any(map(shutil.which, compilers)):
        raise OptionError(
            "compile='inductor' needs a C++ compiler, and none was found",
            got=" and ".join(f"no {name}" for name in compilers),
            do="Install one, name it in the environment variable CXX, or use compile='graph'.",
        )


class CompiledScore:
    """``score(u, args, kwargs)`` of particles ``u [S, D]``, ``[S]``, as one graph for each form of the arguments.

    A graph is used only after it has given the values and gradients of ``score``, at several numbers of particles.
    Where one graph cannot take any number of them, particles go through it ``rows`` at a time, the last ones
    filled up with copies of the first.

    Args:
        score: The batched log density; it scores each row of ``u`` by itself.
        points: Particles ``[P, D]`` with finite values and gradients, for tracing and comparing.
        agree: Whether a result of the graph, and that of ``score``, are equal but for rounding.
        backend: ``"graph"`` runs the recorded operations one by one; ``"inductor"`` compiles them.
        minibatch: What gives subsampled plates their indices when ``score`` runs the model.
        rows: Particles at a time where that number is fixed.

    Attributes:
        seconds: Time that tracing, compiling and comparing have taken.
    """

    def __init__(
        self,
        score: Score,
        points: Tensor,
        *,
        agree: Callable[[Tensor, Tensor], bool],
        backend: str = "graph",
        minibatch: PinnedSubsample | None = None,
        rows: int = 256,
    ):
        check_compile(backend)
        self.score = score
        self.points = points.detach()
        self.agree = agree
        self.backend = backend
        self.minibatch = PinnedSubsample() if minibatch is None else minibatch
        self.rows = rows
        self.seconds = 0.0
        self._graphs: list[_Graph] = []

    def __call__(self, u: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Score particles ``u [S, D]``: ``[S]``, differentiable once, in ``u`` alone.

        Raises:
            ModelError: The model cannot be traced with arguments of this form, or its graph gives other numbers.
        """
        leaves, spec = tree_flatten((args, kwargs))
        graph = self._graph(leaves, spec)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs += [self.minibatch.draw(name) for name in graph.plates]
        if torch.is_grad_enabled() and u.requires_grad:
            scores: Tensor = _Differentiable.apply(u, graph, inputs)
            return scores
        return graph.values(u, inputs)[0]

    def _graph(self, leaves: list[Any], spec: TreeSpec) -> _Graph:
        """The graph for arguments of this form; a new one is traced and compared."""
        kinds = [_kind(leaf) for leaf in leaves]
        for graph in self._graphs:
            if graph.kinds == kinds and graph.spec == spec:
                return graph
        if len(self._graphs) == MAX_GRAPHS:
            raise ModelError(f"the arguments of the model came in more than {MAX_GRAPHS} forms")
        began = time.perf_counter()
        # a look at the model that leaves no trace in the random numbers
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            for category in (DeprecationWarning, FutureWarning):  # torch's compiler warns of itself
                warnings.simplefilter("ignore", category)
            try:
                graph = self._traced(leaves, spec, kinds, None)
            except Exception:  # a shape was taken for constant, or worse, which comes again
                try:
                    graph = self._traced(leaves, spec, kinds, self.rows)
                except ModelError:
                    raise
                except Exception as error:
                    line = (str(error).splitlines() or [""])[0]
                    raise ModelError(f"tracing raised {type(error).__name__}: {line}") from error
        self._graphs.append(graph)
        self.seconds += time.perf_counter() - began
        return graph

    def _traced(self, leaves: list[Any], spec: TreeSpec, kinds: list[Any], rows: int | None) -> _Graph:
        """A graph for ``rows`` particles, or for any number, that agrees with ``score``."""

        def run(u: Tensor, leaves: list[Any], indices: dict[str, Tensor] | None) -> tuple[Pair, dict[str, Tensor]]:
            args, kwargs = tree_unflatten(leaves, spec)
            with torch.enable_grad(), self.minibatch.pinned(indices) as used:
                v = u.detach().requires_grad_()
                scores = self.score(v, args, kwargs)
                if scores.dim() != 1:
                    raise ModelError("a particle has more than one score")
                (gradient,) = torch.autograd.grad(scores.sum(), v)
            return (scores.detach(), gradient), used

        _, indices = run(self.points, leaves, None)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = [leaves[i] for i in places] + list(indices.values())

        def both(u: Tensor, *inputs: Tensor) -> Pair:
            filled = list(leaves)
            for i, given in zip(places, inputs, strict=False):
                filled[i] = given
            names = zip(indices, inputs[len(places) :], strict=True)
            return run(u, filled, dict(names))[0]

        sizes = {size for tensor in (self.points, *inputs) for size in tensor.shape}
        # where the number of particles is open, no other size may be taken for it
        count = rows or next(n for n in range(5, 10**6) if n not in sizes)
        traced = make_fx(both, tracing_mode="real" if rows else "symbolic", _allow_non_fake_inputs=True)(
            _repeat(self.points, count), *inputs
        )
        _refuse_what_would_be_frozen(traced)
        graph = _Graph(traced, spec, kinds, tuple(indices), rows, self.backend)
        for several in (1, len(self.points), 2 * count + 1):
            u = _repeat(self.points, several)
            exact = run(u, leaves, indices)[0]
            for fast in (graph.both(u, inputs), graph.values(u, inputs)):
                if not all(map(self.agree, fast, exact)):
                    raise ModelError("the graph and the model disagree")
        return graph


def compile_networks(*modules: nn.Module | None) -> None:
    """Compile, in place, the networks that ``modules`` are made of; names in their state stay what they are.

    Noise is drawn outside of them, by torch's own generators as before.
    """
    for module in modules:
        for child in [] if module is None else module.children():
            child.compile(dynamic=True)


class _Graph:
    """One traced function ``(u [S, D], *inputs) -> (values [S], gradients [S, D])``, and its first half alone."""

    def __init__(
        self,
        traced: GraphModule,
        spec: TreeSpec,
        kinds: list[Any],
        plates: tuple[str, ...],
        rows: int | None,
        backend: str,
    ):
        self.spec = spec
        self.kinds = kinds
        self.plates = plates
        self.rows = rows
        self._both = _compiled(traced, backend, rows)
        self._values = _compiled(_first_half(traced), backend, rows)

    def both(self, u: Tensor, inputs: list[Tensor]) -> Pair:
        """Values ``[S]`` and gradients ``[S, D]``."""
        return self._run(self._both, u, inputs)

    def values(self, u: Tensor, inputs: list[Tensor]) -> Pair:
        """Values ``[S]`` alone."""
        return self._run(self._values, u, inputs)

    @torch.no_grad()
    def _run(self, graph: Callable[..., Pair], u: Tensor, inputs: list[Tensor]) -> Pair:
        count, rows = len(u), self.rows or max(len(u), 2)  # one particle has a shape of its own
        missing = -count % rows
        if missing:
            u = torch.cat([u, u[:1].expand(missing, -1)])
        parts = [graph(part, *inputs) for part in u.detach().split(rows)]
        if len(parts) == 1 and not missing:
            return parts[0]
        return tuple(torch.cat(part)[:count] for part in zip(*parts, strict=True))


class _Differentiable(torch.autograd.Function):
    """The values of a graph, with its gradients in ``u``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, graph: _Graph, inputs: list[Tensor]) -> Tensor:
        values, gradient = graph.both(u, inputs)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[:, None] * gradient, None, None


def _compiled(traced: GraphModule, backend: str, rows: int | None) -> Callable[..., Pair]:
    if backend == "graph":
        return traced
    compiled: Callable[..., Pair] = torch.compile(traced, dynamic=rows is None)
    return compiled


def _first_half(traced: GraphModule) -> GraphModule:
    """The graph without its gradients, and without what only they need."""
    graph = deepcopy(traced.graph)
    (output,) = graph.find_nodes(op="output")
    output.args = (output.args[0][:1],)
    graph.eliminate_dead_code()
    return GraphModule(traced, graph)


def _refuse_what_would_be_frozen(traced: GraphModule) -> None:
    """Raise `ModelError` where a graph would leave out what the model does."""
    for node in traced.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(traced, node.target), "requires_grad", False):
            raise ModelError("the model has parameters that learn, and a graph gives them no gradient")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ModelError(
                f"the model draws random numbers of its own ({node.target}), which all particles must share"
            )


def _kind(leaf: Any) -> tuple[Any, ...]:
    """What decides which graph is used for an argument."""
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise ModelError("an argument needs a gradient, which a graph does not give")
        return tuple(leaf.shape), leaf.dtype, leaf.device
    constant = None | bool | int | float | complex | str | bytes | torch.dtype | torch.device
    if isinstance(leaf, constant) or callable(leaf):
        return type(leaf), leaf
    raise ModelError(
        "an argument is neither tensor nor number, and a graph would not see it change", got=type(leaf).__name__
    )


def _repeat(points: Tensor, count: int) -> Tensor:
    """``count`` particles, the points over and over."""
    return points.repeat(-(-count // len(points)), 1)[:count]
