"""Copy and pickle guides and fits: whole, or with an error that says how to keep them instead."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any, Self

from implicitvi.errors import ImplicitVIError, SetupError
from implicitvi.pyro_model.tracing import first_line

_is_tried = ContextVar("whether an object around this one is being pickled on trial", default=False)


class Copyable:
    """A base class of objects whose copies are whole: a deep copy has networks, data and random numbers of its own.

    Pickle stores functions by name, so it takes only those of a module; cloudpickle, as in joblib, takes any.
    """

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = memo[id(self)] = type(self).__new__(type(self))
        state: Any = self.__getstate__()
        with _refusals(self, "copied"):
            other.__setstate__(deepcopy(state, memo))
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not _is_tried.get() and not _takes_any_function():
            token = _is_tried.set(True)
            try:
                with _refusals(self, "pickled"):
                    pickle.dumps(self, protocol)
            finally:
                _is_tried.reset(token)
        return super().__reduce_ex__(protocol)


@contextmanager
def _refusals(what: object, done: str) -> Iterator[None]:
    """Raise `SetupError` where an object holds something that cannot be copied or pickled."""
    try:
        yield
    except ImplicitVIError:
        raise
    except Exception as error:  # each kind of object has errors of its own
        advice = "Make the model and other functions at the top level of a module; or keep a fit by fit.save(folder)"
        advice += " and AVBSVI.load(folder, model), a guide by its state_dict()."
        raise SetupError(f"This {type(what).__name__} cannot be {done}: {first_line(error)}. {advice}") from error


def _takes_any_function() -> bool:
    """Return whether the pickler that asks is cloudpickle's or dill's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if {"cloudpickle", "dill"} & set(frame.f_globals.get("__name__", "").split(".")):
            return True
        frame = frame.f_back
    return False
