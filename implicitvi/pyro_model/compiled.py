"""Compile a batched log density into one graph of tensor operations: traced once, then run without the model's code.

Scoring a Pyro model takes as long for one particle as for a thousand; most of that time is Python's. A graph of values
and gradients avoids it: `torch.fx` records the graph, and PyTorch's compiler may turn it into machine code.

Tensors among the model's arguments are inputs of the graph, so new data of the same shapes take effect; other
arguments, shapes, dtypes and devices decide which graph is used. A global or an attribute that is a tensor is the one
found at tracing: changes in place take effect, another tensor under the same name does not. The indices of subsampled
plates are inputs too, drawn again for every call and shared by all particles.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from implicitvi.errors import ModelError, OptionError, check_choice
from implicitvi.pyro_model.subsampling import PinnedSubsample
from implicitvi.pyro_model.tracing import first_line

BACKENDS = ("graph", "inductor")
MAX_GRAPHS = 8
Score = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
Tensors = tuple[Tensor, ...]
Form = tuple[TreeSpec, list[Any]]  # of the arguments: how they are nested, and what each of them is


def check_compile(backend: str | None) -> None:
    """Raise `OptionError` unless ``backend`` is ``None`` or one of `BACKENDS` that works on this machine."""
    if backend is None:
        return
    check_choice("compile", backend, BACKENDS)
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
    if backend == "inductor" and not any(map(shutil.which, compilers)):
        raise OptionError(
            f"compile='inductor' needs a C++ compiler, and none of {', '.join(compilers)} was found. Install one, "
            "name it in the environment variable CXX, or use compile='graph'."
        )


@dataclass(eq=False)
class CompiledScore:
    """A compiled ``score(u, args, kwargs)`` of particles ``u [S, D]``, with a graph for each form of the arguments.

    A graph is used only after it has reproduced the values and gradients of ``score`` at several numbers of particles.
    One that cannot take any number of particles takes ``rows`` at a time, the last padded with copies of the first.

    Args:
        score: The batched log density; it scores each row of ``u`` by itself.
        points: Particles ``[P, D]`` with finite values and gradients, for tracing and comparing.
        agree: Returns whether a result of the graph and that of ``score`` are equal up to rounding.
        backend: ``"graph"`` runs the recorded operations one by one; ``"inductor"`` compiles them.
        minibatch: The messenger that gives subsampled plates their indices when ``score`` runs the model.
        rows: Particles at a time in a graph for a fixed number.

    Attributes:
        seconds: Time spent on tracing, compiling and comparing.
    """

    score: Score
    points: Tensor
    agree: Callable[[Tensor, Tensor], bool]
    backend: str = "graph"
    minibatch: PinnedSubsample = field(default_factory=PinnedSubsample)
    rows: int = 256

    def __post_init__(self) -> None:
        check_compile(self.backend)
        self.points = self.points.detach()
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
        return graph(u, inputs, gradients=False)[0]

    def _graph(self, leaves: list[Any], spec: TreeSpec) -> _Graph:
        """Return the graph for arguments of this form; trace and compare a new one."""
        form = (spec, [_describe(leaf) for leaf in leaves])
        for graph in self._graphs:
            if graph.form == form:
                return graph
        if len(self._graphs) == MAX_GRAPHS:
            raise ModelError(f"The arguments of the model came in more than {MAX_GRAPHS} forms.")
        began = time.perf_counter()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            for category in (DeprecationWarning, FutureWarning):  # torch's compiler triggers its own warnings
                warnings.simplefilter("ignore", category)
            try:
                graph = self._trace(leaves, form, None)
            except Exception:  # a shape was taken for constant, or an error that will be raised again
                try:
                    graph = self._trace(leaves, form, self.rows)
                except ModelError:
                    raise
                except Exception as error:
                    raise ModelError(f"Tracing raised {first_line(error).rstrip('.')}.") from error
        self._graphs.append(graph)
        self.seconds += time.perf_counter() - began
        return graph

    def _trace(self, leaves: list[Any], form: Form, rows: int | None) -> _Graph:
        """Trace a graph for ``rows`` particles, or for any number, and check that it agrees with ``score``."""

        def run(u: Tensor, leaves: list[Any], indices: dict[str, Tensor] | None) -> tuple[Tensors, dict[str, Tensor]]:
            args, kwargs = tree_unflatten(leaves, form[0])
            with torch.enable_grad(), self.minibatch.pinned(indices) as used:
                v = u.detach().requires_grad_()
                scores = self.score(v, args, kwargs)
                if scores.dim() != 1:
                    raise ModelError("A particle has more than one score.")
                (gradient,) = torch.autograd.grad(scores.sum(), v)
            return (scores.detach(), gradient), used

        _, indices = run(self.points, leaves, None)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)] + list(indices.values())

        def values_and_gradients(u: Tensor, *inputs: Tensor) -> Tensors:
            given = iter(inputs)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return run(u, filled, dict(zip(indices, given, strict=True)))[0]

        sizes = {size for tensor in (self.points, *inputs) for size in tensor.shape}
        # an open number of particles must differ from every other size, or the two are taken for one
        count = rows or next(n for n in range(5, 10**6) if n not in sizes)
        tracer = make_fx(values_and_gradients, tracing_mode="real" if rows else "symbolic", _allow_non_fake_inputs=True)
        traced = tracer(_repeat(self.points, count), *inputs)
        _check_graph(traced)
        graph = _Graph(traced, form, tuple(indices), rows, self.backend)
        for several in (1, len(self.points), 2 * count + 1):
            u = _repeat(self.points, several)
            exact = run(u, leaves, indices)[0]
            for gradients in (True, False):
                if not all(map(self.agree, graph(u, inputs, gradients=gradients), exact)):
                    raise ModelError("The graph and the model disagree.")
        return graph


def compile_networks(*modules: nn.Module | None) -> None:
    """Compile the child networks of ``modules`` in place; names in their state stay, and noise is drawn outside."""
    for module in modules:
        for child in [] if module is None else module.children():
            child.compile(dynamic=True)


class _Graph:
    """A traced function ``(u [S, D], *inputs) -> (values [S], gradients [S, D])``, and one of the values alone."""

    def __init__(self, traced: GraphModule, form: Form, plates: tuple[str, ...], rows: int | None, backend: str):
        self.form, self.plates, self.rows = form, plates, rows
        graphs: tuple[Callable[..., Tensors], ...] = (traced, _without_gradients(traced))
        if backend == "inductor":
            graphs = tuple(torch.compile(graph, dynamic=rows is None) for graph in graphs)
        self._values_and_gradients, self._values = graphs

    @torch.no_grad()
    def __call__(self, u: Tensor, inputs: list[Tensor], *, gradients: bool) -> Tensors:
        """Return values ``[S]``, and gradients ``[S, D]`` if asked for."""
        graph = self._values_and_gradients if gradients else self._values
        count, rows = len(u), self.rows or max(len(u), 2)  # one particle has a shape of its own
        if count == rows:
            return graph(u.detach(), *inputs)
        padded = torch.cat([u.detach(), u[:1].expand(-count % rows, -1)])
        parts = [graph(part, *inputs) for part in padded.split(rows)]
        return tuple(torch.cat(part)[:count] for part in zip(*parts, strict=True))


class _Differentiable(torch.autograd.Function):
    """A function from ``u`` to the values of a graph, differentiated by the graph's own gradients."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, graph: _Graph, inputs: list[Tensor]) -> Tensor:
        values, gradient = graph(u, inputs, gradients=True)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[:, None] * gradient, None, None


def _without_gradients(traced: GraphModule) -> GraphModule:
    """Return the graph without its gradients and without the operations that only they need."""
    graph = deepcopy(traced.graph)
    (output,) = graph.find_nodes(op="output")
    output.args = (output.args[0][:1],)
    graph.eliminate_dead_code()
    return GraphModule(traced, graph)


def _check_graph(traced: GraphModule) -> None:
    """Raise `ModelError` if a graph holds learned parameters or random numbers fixed."""
    for node in traced.graph.nodes:
        if node.op == "get_attr" and getattr(getattr(traced, node.target), "requires_grad", False):
            raise ModelError("The model has parameters that learn, and a graph does not give them a gradient.")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            draws = f"draws random numbers of its own ({node.target})"
            raise ModelError(f"The model {draws}, which all particles must share.")


def _describe(leaf: Any) -> tuple[Any, ...]:
    """Return the properties of an argument that decide which graph is used."""
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise ModelError("An argument needs a gradient, which a graph does not give.")
        return tuple(leaf.shape), leaf.dtype, leaf.device
    constant = None | bool | int | float | complex | str | bytes | torch.dtype | torch.device
    if isinstance(leaf, constant) or callable(leaf):
        return type(leaf), leaf
    got = f"{type(leaf).__name__}, whose changes a graph would not see"
    raise ModelError.must_be("An argument", "a tensor or a number", got)


def _repeat(points: Tensor, count: int) -> Tensor:
    """Return ``count`` particles, repeating the points."""
    return points.repeat(-(-count // len(points)), 1)[:count]
