"""The arguments of one call of a Pyro model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Arguments:
    """The positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, *args: Any, **kwargs: Any) -> Arguments:
        """Return the arguments as given."""
        return cls(args, kwargs)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among them, nested ones included."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """Return the arguments with a function applied to their tensors."""
        return Arguments(*tree_map_only(Tensor, function, (self.args, self.kwargs)))

    def devices(self) -> set[str]:
        """Return the devices of their tensors."""
        return {str(tensor.device) for tensor in self.tensors()}
