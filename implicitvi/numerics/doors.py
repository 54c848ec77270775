"""Enter code that runs Pyro models: one thread at a time, with gradients whatever the caller has switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

from implicitvi.errors import SetupError

_lock = RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Let other threads wait: Pyro's handlers, torch's generators and argument checks belong to the whole process."""
    with _lock:
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Enter `exclusive`, and switch gradients on inside ``torch.no_grad`` and ``torch.inference_mode``.

    Raises:
        SetupError: New tensors would be on the meta device, where they have no values.
    """
    with exclusive(), torch.inference_mode(False), torch.enable_grad():
        if torch.empty(0).is_meta:
            advice = "Leave the block of torch.device('meta')."
            raise SetupError.must_be("torch's default device", "one that holds values", "meta", advice)
        yield
