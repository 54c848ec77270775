"""Compare the arguments of a model's calls: which of them need another look at the model."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from implicitvi.pyro_model.arguments import Arguments

PLAIN = (bool, int, str, type(None))  # compared by value; other objects by their type
Form = tuple[TreeSpec, tuple[Any, ...]]
Range = tuple[float, float, bool]  # least entry, largest entry, whether all are whole numbers


class KnownArguments:
    """The arguments that a model has been read with: their forms, and the ranges of their tensors.

    Other arguments of a known form whose entries lie in the range of those before have the same supports, so a step
    need not run the model to check them.

    Args:
        first: The arguments of the first call, at which the model has been read.
    """

    def __init__(self, first: Arguments):
        self.first = first
        self._ranges: dict[Form, list[Range]] = {}
        self._last: tuple[list[Any], list[int]] = ([], [])
        self.add(first)

    def are_last(self, arguments: Arguments) -> bool:
        """Return whether these are the objects of the last call, unchanged."""
        leaves, versions = self._last
        now = tree_leaves((arguments.args, arguments.kwargs))
        return len(now) == len(leaves) and all(map(is_, now, leaves)) and _versions(now) == versions

    def cover(self, arguments: Arguments) -> bool:
        """Return whether the arguments have a known form and range."""
        known = self._ranges.get(_form(arguments))
        ranges = [_range(tensor) for tensor in arguments.tensors()]
        return known is not None and all(map(_includes, known, ranges))

    def add(self, arguments: Arguments) -> None:
        """Remember arguments at which the model has been read."""
        leaves = tree_leaves((arguments.args, arguments.kwargs))
        self._last = leaves, _versions(leaves)
        form, ranges = _form(arguments), [_range(tensor) for tensor in arguments.tensors()]
        known = self._ranges.get(form, ranges)
        self._ranges[form] = [
            (min(a, c), max(b, d), e and f) for (a, b, e), (c, d, f) in zip(known, ranges, strict=True)
        ]


def forms(arguments: Arguments) -> str:
    """Describe arguments by their types and shapes.

    >>> forms(Arguments.of(torch.ones(3), scale=2))
    '(Tensor [3], scale=int)'
    """
    named = [(f"{name}=", value) for name, value in arguments.kwargs.items()]
    parts = [name + _describe(value) for name, value in [*(("", value) for value in arguments.args), *named]]
    return f"({', '.join(parts)})"


def outside_inference(arguments: Arguments) -> Arguments:
    """Return the arguments with copies of tensors made in ``torch.inference_mode``, which cannot have gradients."""
    if not any(tensor.is_inference() for tensor in arguments.tensors()):
        return arguments
    return arguments.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _describe(value: Any) -> str:
    return f"Tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _form(arguments: Arguments) -> Form:
    leaves, spec = tree_flatten((arguments.args, arguments.kwargs))
    return spec, tuple(
        (leaf.shape, leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf if isinstance(leaf, PLAIN) else None)
        for leaf in leaves
    )


def _versions(leaves: list[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


@torch.no_grad()
def _range(tensor: Tensor) -> Range:
    """Return the range of a tensor's entries; NaN lies in no other range, and those of sparse ones are not compared."""
    is_dense = tensor.layout is torch.strided and not tensor.is_meta
    if not is_dense or not tensor.numel() or tensor.dtype == torch.bool or tensor.is_complex():
        return 0.0, 0.0, True
    least, largest = (each.item() for each in tensor.aminmax())
    whole = not tensor.is_floating_point() or bool((tensor == tensor.round()).all())
    return least, largest, whole


def _includes(known: Range, found: Range) -> bool:
    return known[0] <= found[0] and found[1] <= known[1] and (found[2] or not known[2])
