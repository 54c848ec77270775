"""Fits in folders: what `AVBSVI.save` writes about a fit, and how it is made again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from math import isclose, isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicitvi.avb.adversaries import GatedAdversary
from implicitvi.avb.ratios import RATIOS
from implicitvi.avb.samplers import SAMPLERS, Sampler
from implicitvi.errors import CheckpointError, ModelError
from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.tracing import PARTICLE_ERRORS, run_at, score, sites_without_density, unvalidated
from implicitvi.rng import RandomStream
from implicitvi.training import Trainer
from implicitvi.training.checkpoint import check_same, read_state, save_state

KIND = "AVBSVI"
CUSTOM = "a function or object of your own"
OF_GUIDE = ("sampler", "amortize")  # options of the guide; all others are those of AVBSVI
# these decide how the numbers of a fit are come by, and how many fits there are, but no number
FREE = ("mode", "compile", "max_skips", "restarts")


@dataclass(frozen=True)
class SavedFit:
    """What a folder holds of a fit.

    Attributes:
        config: What it belongs to: options, latent sites, shapes of all weights.
        state: The trainer's state under ``"fit"``, a probe of the sampler, the record of the last run, and the model's
            `log_density`.
    """

    config: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> SavedFit:
        """Read a folder that `AVBSVI` wrote.

        Raises:
            CheckpointError: It is damaged, of a newer format, or of another kind of fit.
        """
        config, state = read_state(folder)
        check_same(config, {"kind": KIND})
        return cls(config, state)

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.state["fit"]["step"])

    @property
    def log_density(self) -> float:
        """The model's `log_density`, NaN in files from before it was kept."""
        return float(self.state.get("log density", nan))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the fit, `CUSTOM` for what a file cannot hold."""
        options = dict(self.config["options"])
        if options["tempering"] == "auto":  # of the first files: none after a third of the steps
            options["tempering"] = None
        return options

    def options_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with what is given (not ``None``) in place of those that a file cannot hold.

        Raises:
            CheckpointError: One of those is not given.
        """
        given = {name: value for name, value in given.items() if value is not None}
        missing = [k for k, value in self.options.items() if value == CUSTOM and k not in given]
        if missing:
            inside = ", ".join(f"{name}=..." for name in missing if name in OF_GUIDE)
            again = [f"{name}=..." for name in missing if name not in OF_GUIDE]
            again += [f"guide=ImplicitGuide(model, {inside})"] if inside else []
            raise CheckpointError(
                "the fit was made with functions of your own, which a checkpoint does not hold",
                got=", ".join(missing),
                do=f"Pass them again: AVBSVI.load(folder, model, {', '.join(again)}).",
            )
        return self.options | given

    def restore(self, guide: ImplicitGuide) -> None:
        """Give a guide that is set up its weights, and see that they do what they did.

        Raises:
            CheckpointError: The guide has other latent sites or networks, or the same networks now give other draws.
        """
        check_same(self.config, {"sites": sites(guide)})
        prefix = "module."
        modules = self.state["fit"]["players"]["sampler"]["modules"]
        weights = {k.removeprefix(prefix): v for k, v in modules.items() if k.startswith(prefix)}
        guide.split_as(weights.get("weights"))
        check_same({"sampler": _shapes(weights)}, {"sampler": _shapes(guide.sampler.state_dict())})
        guide.sampler.load_state_dict(weights)
        for sampler, probe in zip(_parts(guide.sampler), self.state["probe"], strict=True):
            now, then = _answer(sampler, probe), probe["z"].to(sampler.loc)
            if not torch.allclose(now, then, rtol=0, atol=1e-3 * float(then.abs().max()), equal_nan=True):
                raise CheckpointError(
                    "the sampler does not give the draws that it gave when it was saved",
                    got=f"a difference of {float((now - then).abs().max()):.2g}",
                    expected="at most a thousandth of their size",
                    do="Use the version of implicitvi in config.json, and the same sampler.",
                )


def save(
    folder: Path,
    *,
    options: dict[str, Any],
    guide: ImplicitGuide,
    trainer: Trainer,
    record: dict[str, Any],
    density: float,
    notes: dict[str, Any],
) -> None:
    """Write a fit into a folder."""
    config = {"kind": KIND, "versions": _versions(), "notes": notes, "options": options, **belongings(guide, trainer)}
    state = {"fit": trainer.state_dict(), "probe": _probe(guide), "record": record, "log density": density}
    save_state(folder, state, config=config)


def log_density(guide: ImplicitGuide, model: Model, *args: Any, **kwargs: Any) -> float:
    """Log density of the model's sites, in nats, at a place that a guide keeps: so a state knows its model and data.

    NaN where the model cannot be scored there.
    """
    sampler, layout = guide.sampler, guide.layout
    u = sampler.loc if isinstance(sampler, Sampler) else sampler.local.loc.new_zeros(layout.dim)
    values, _ = layout.unpack(u)
    with torch.no_grad(), RandomStream(0), unvalidated():
        try:
            trace = run_at(model, values, *args, **kwargs)
            score(trace, values, sites_without_density(model, values, *args, **kwargs))
        except (ModelError, RuntimeError, *PARTICLE_ERRORS):
            return nan
    nodes = trace.nodes.values()
    return float(sum(node["log_prob_sum"].item() for node in nodes if "log_prob_sum" in node))


def check_density(then: float, now: float) -> None:
    """Raise `CheckpointError` where a model's `log_density` is not what it was; NaN is not compared."""
    if isfinite(then) and not isclose(then, now, rel_tol=1e-4, abs_tol=1e-3):
        raise CheckpointError(
            "the checkpoint belongs to a fit of another model or other data",
            got=f"a log density of {now:.6g} where it was left",
            expected=f"{then:.6g}",
            do="Use another folder; to go on from this fit with new data, AVBSVI.load(folder, model).run(...).",
        )


def belongings(guide: ImplicitGuide, trainer: Trainer) -> dict[str, Any]:
    """What a state must agree on with the guide and the loop that take it up."""
    weights: dict[str, Tensor] = {
        f"{player.name}: {name}": tensor
        for player in trainer.players
        for part in player.state_dict().values()
        for name, tensor in part.items()
    }
    return {"sites": sites(guide), "weights": _shapes(weights)}


def decisive(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide the numbers of a fit."""
    return {name: value for name, value in options.items() if name not in FREE}


def as_written(guide: ImplicitGuide, **options: Any) -> dict[str, Any]:
    """Options of `AVBSVI` and of its guide as a file holds them: numbers, words, pairs, and `CUSTOM`."""
    amortization = guide.amortization
    if options["adversary"] is GatedAdversary:
        options["adversary"] = "gated"
    ratios = (name for name, kind in RATIOS.items() if options["ratio"] == kind())
    options["ratio"] = next(ratios, options["ratio"])
    kinds = (name for name, kind in SAMPLERS.items() if kind is guide._make_sampler)
    options["sampler"] = next(kinds, CUSTOM)
    options["amortize"] = None if amortization is None else CUSTOM
    if amortization is not None and amortization.features is None:
        options["amortize"] = amortization.plate
    return {name: _plain(value) for name, value in options.items()}


def sites(guide: ImplicitGuide) -> dict[str, list[int | None]]:
    """Shapes of the latent sites; the size of the plate that a guide is amortized over is open."""
    return {
        site.name: [
            None if dim is not None and dim == guide.plate else size
            for size, dim in zip(site.shape, [*site.dims, *[None] * site.event_dim], strict=True)
        ]
        for site in guide.layout.sites
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("implicitvi", "pyro-ppl", "torch")}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value if value is None or isinstance(value, bool | int | float | str) else CUSTOM


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _parts(sampler: Sampler | AmortizedSampler) -> list[Sampler]:
    """The samplers of shared and local latents, or the only one."""
    if isinstance(sampler, Sampler):
        return [sampler]
    return [part for part in (sampler.shared, sampler.local) if part is not None]


def _probe(guide: ImplicitGuide) -> list[dict[str, Tensor | None]]:
    """Noise, contexts, and what the samplers make of them."""
    probes: list[dict[str, Tensor | None]] = []
    for sampler in _parts(guide.sampler):
        with RandomStream(0):
            x = torch.randn(3, sampler.context_dim).to(sampler.loc) if sampler.context_dim else None
            probe: dict[str, Tensor | None] = {"eps": sampler.noise(4, x), "x": x}
        probes.append(probe | {"z": _answer(sampler, probe)})
    return probes


@torch.no_grad()
def _answer(sampler: Sampler, probe: Mapping[str, Tensor | None]) -> Tensor:
    eps, x = probe["eps"], probe["x"]
    assert eps is not None
    x = None if x is None else x.to(sampler.loc)
    return sampler.to_latent(sampler.transform(eps.to(sampler.loc), x), x)
