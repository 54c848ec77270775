"""Find the parameters of a Pyro model, which a fit learns together with the posterior."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor, nn

from implicitvi.errors import ModelError
from implicitvi.numerics.types import Model


def model_parameters(model: Model, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Return the unconstrained leaf of every ``pyro.param`` and ``PyroModule`` parameter that the model uses.

    The leaves live where Pyro keeps them, so ``pyro.param(name)`` and the module show the learned values. Parameters of
    the model's own module that Pyro does not see, as those of a plain layer in a PyroModule, cause a warning. The model
    is run once, at ``values`` of its latent sites, ``{site: [*site shape]}``; leaves without gradients are left out.

    Raises:
        ModelError: An older parameter of the same name in Pyro's store hides one of the model's own module.
    """
    with poutine.block():
        conditioned = poutine.condition(model, data=values)
        trace = poutine.trace(conditioned, param_only=True).get_trace(*args, **kwargs)
    own = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    leaves = {}
    for name, node in trace.nodes.items():
        if node["type"] != "param":
            continue
        leaf: Any = node["value"]
        leaf = leaf if leaf.is_leaf else leaf.unconstrained()
        if name in own and own[name] is not leaf:
            message = f"The model's parameter {name} is hidden by an older one of that name in Pyro's store. Call "
            message += (
                "pyro.clear_param_store() before the second model, or pyro.settings.set(module_local_params=True)."
            )
            raise ModelError(message, faq="a-parameter-keeps-its-old-value")
        if leaf.requires_grad:
            leaves[name] = leaf
    seen = {id(leaf) for leaf in leaves.values()}
    unseen = [name for name, leaf in own.items() if leaf.requires_grad and id(leaf) not in seen]
    if unseen:
        message = f"Pyro does not see these parameters of the model, so they are not learned: {', '.join(unseen)}. "
        message += "Make every layer a PyroModule (pyro.nn.module.to_pyro_module_), or call pyro.module in the model. "
        warnings.warn(f"{message}If that is intended, call requires_grad_(False).", stacklevel=2)
    return leaves


def parameter_values(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the current values of parameters, constrained, without gradients."""
    store = pyro.get_param_store()
    return {name: (store[name] if name in store else leaf).detach().clone() for name, leaf in leaves.items()}


def show_parameters(leaves: dict[str, Tensor]) -> None:
    """Call ``pyro.param`` for these parameters, so that an enclosing trace, as that of `pyro.infer.SVI`, has them."""
    for name in leaves.keys() & pyro.get_param_store().keys():
        pyro.param(name)
