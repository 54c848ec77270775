"""The parameters of a Pyro model, which a fit learns beside the posterior."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor, nn

from implicitvi.errors import ModelError


def model_parameters(
    model: Callable[..., Any], values: dict[str, Tensor], *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """The unconstrained leaves of every ``pyro.param`` and ``PyroModule`` parameter that the model meets.

    Warns of parameters of the model's own module that it does not meet, as those of a plain layer in a PyroModule.

    The leaves live where Pyro keeps them, so ``pyro.param(name)`` and the module show what has been learned.

    Args:
        model: The Pyro model; it is run once.
        values: Values of its latent sites, so that it is run where it is known to work.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        ``{name: leaf}``, those that do not ask for a gradient left out.

    Raises:
        ModelError: A parameter of the model's own module is hidden by an older one of its name in Pyro's store.
    """
    with poutine.block():
        there = poutine.condition(model, data=values)
        trace = poutine.trace(there, param_only=True).get_trace(*args, **kwargs)
    own = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    leaves = {}
    for name, node in trace.nodes.items():
        if node["type"] != "param":
            continue
        leaf: Any = node["value"]
        if not leaf.is_leaf:
            leaf = leaf.unconstrained()
        if name in own and own[name] is not leaf:
            raise ModelError(
                f"the model's parameter {name} is hidden by an older one of that name in Pyro's store",
                do="Call pyro.clear_param_store() before the second model, or set "
                "pyro.settings.set(module_local_params=True).",
                faq="a-parameter-keeps-its-old-value",
            )
        if leaf.requires_grad:
            leaves[name] = leaf
    met = {id(leaf) for leaf in leaves.values()}
    unseen = [name for name, leaf in own.items() if leaf.requires_grad and id(leaf) not in met]
    if unseen:
        warnings.warn(
            f"the model has parameters that Pyro does not see, which therefore are not learned: {', '.join(unseen)}. "
            "Make every layer a PyroModule (pyro.nn.module.to_pyro_module_), or call pyro.module in the model; "
            "requires_grad_(False) says that it is meant",
            stacklevel=2,
        )
    return leaves


def parameter_values(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The present values of parameters, constrained, without gradients."""
    store = pyro.get_param_store()
    return {name: (store[name] if name in store else leaf).detach().clone() for name, leaf in leaves.items()}


def show_parameters(leaves: dict[str, Tensor]) -> None:
    """Let whoever watches, such as `pyro.infer.SVI`, see these parameters."""
    for name in leaves.keys() & pyro.get_param_store().keys():
        pyro.param(name)
