"""Record the metrics of every step."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class History:
    """A record of the metrics of every step, by name.

    Tensors stay on their device until a metric is read; then all of its values are transferred at once.

    >>> history = History()
    >>> history.append(loss=2.0); history.append(loss=torch.tensor(1.0))
    >>> history["loss"]
    array([2., 1.])
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)
        self._fetched: dict[str, array[float]] = defaultdict(_doubles)

    def append(self, **metrics: float | Tensor) -> None:
        """Add one step."""
        for name, value in metrics.items():
            self._values[name].append(value.detach().clone() if isinstance(value, Tensor) else float(value))

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        if self._values and name not in self._values:  # before the first step there are none
            raise KeyError(f"no metric {name!r}; there are {sorted(self._values)}")
        return np.array(self._fetch(name))

    def names(self) -> list[str]:
        """Return the names of the metrics."""
        return list(self._values)

    def last(self, name: str, count: int = 1) -> float:
        """Return the mean of the finite ones among the last ``count`` values, NaN if there are none."""
        values = np.array(self._fetch(name)[-count:])
        finite = values[np.isfinite(values)]
        return float(finite.mean()) if finite.size else float("nan")

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of all values, in double precision."""
        return {name: torch.from_numpy(self[name]) for name in self.names()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state that `state_dict` returned."""
        self._fetched = defaultdict(_doubles, {n: _doubles(v.tolist()) for n, v in state.items()})
        self._values = defaultdict(list, {name: [] for name in state})

    def _fetch(self, name: str) -> array[float]:
        """Return all values of a metric as floats; those that are still tensors arrive in one transfer."""
        fetched, waiting = self._fetched[name], self._values.get(name, [])
        tensors = [value for value in waiting if isinstance(value, Tensor)]
        arrived = iter(torch.stack(tensors).tolist() if tensors else [])
        fetched.extend(next(arrived) if isinstance(value, Tensor) else value for value in waiting)
        waiting.clear()
        return fetched


def _doubles(values: Iterable[float] = ()) -> array[float]:
    """Return an array of eight bytes per value: a long fit takes millions of steps."""
    return array("d", values)
