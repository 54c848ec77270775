"""Draw from a private stream of random numbers."""

from __future__ import annotations

import operator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor


class RandomStream:
    """A stream of random numbers of one fit, independent of everything else in the process.

    Inside ``with stream:`` torch's default generators continue this stream; outside they keep the caller's state. Two
    fits that take turns therefore make the same draws as each alone. A block that an error or an interrupt ends leaves
    the stream where it was, so that it can be repeated.

    Args:
        seed: Seed of the stream, a whole number of any kind; ``None`` draws one from torch's default generator, which
            ``pyro.set_rng_seed`` sets.

    >>> stream = RandomStream(0)
    >>> with stream: a = torch.rand(1)
    >>> with stream: b = torch.rand(1)
    >>> with RandomStream(0): both = torch.rand(2)
    >>> torch.equal(torch.cat([a, b]), both)
    True
    """

    def __init__(self, seed: int | None = None):
        self._seed = int(torch.randint(2**62, ()).item()) if seed is None else operator.index(seed)
        self._state = [torch.Generator().manual_seed(self._seed).get_state()]

    def __enter__(self) -> RandomStream:
        self._outside = self._read()
        for index in range(len(self._state), len(self._outside)):  # devices not in use before
            self._state.append(torch.Generator(f"cuda:{index - 1}").manual_seed(self._seed).get_state())
        self._write(self._state)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self._state = self._read()
        self._write(self._outside)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the position in the stream, as tensors."""
        return {"generators": [state.clone() for state in self._state]}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Go to a position that `state_dict` returned."""
        self._state = [generator.clone() for generator in state["generators"]]

    @staticmethod
    def _read() -> list[Tensor]:
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return [torch.get_rng_state(), *devices]

    @staticmethod
    def _write(state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if torch.cuda.is_initialized():  # a state may come from a machine with more devices
            torch.cuda.set_rng_state_all(state[1 : 1 + torch.cuda.device_count()])


def forked() -> AbstractContextManager[None]:
    """Restore torch's default generators at the end of a ``with`` block, without starting GPUs that are not in use."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    return torch.random.fork_rng(devices=range(count))


def derived_seed(seed: int, *key: int) -> int:
    """Derive a seed from a seed and a key of numbers >= 0, independent of that of any other key.

    A negative seed counts as the positive one of the same 64 bits.

    >>> derived_seed(0, 1, 2) == derived_seed(0, 1, 2), derived_seed(0, 1, 2) == derived_seed(0, 2, 1)
    (True, False)
    """
    (state,) = np.random.SeedSequence((operator.index(seed) % 2**64, *key)).generate_state(1, np.uint64)
    return int(state) % 2**63
