"""Save fits of `AVBSVI` in folders, and load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
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
from implicitvi.diagnostics.report import Report
from implicitvi.errors import CheckpointError, ImplicitVIError, ModelError
from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.minibatches import dataset
from implicitvi.inference.settings import Settings
from implicitvi.inference.supports import describe_sites, layout_of
from implicitvi.pyro_model.sites import SiteLayout
from implicitvi.pyro_model.target import Target
from implicitvi.pyro_model.tracing import PARTICLE_ERRORS, run_at, score, sites_without_density, unvalidated
from implicitvi.rng import RandomStream
from implicitvi.training import Trainer
from implicitvi.training.checkpoint import check_same, read_state, save_state, well_formed
from implicitvi.training.options import values_of
from implicitvi.training.trainer import check_step

KIND = "AVBSVI"
OWN_OBJECT = "a function or object of your own"  # in place of an option that a file cannot hold
GUIDE_OPTIONS = ("sampler", "amortize")  # the others are those of AVBSVI
NEW_OPTIONS = ("max_modes", "max_steps", "restarts")  # that files of format 1 do not have
STATE, NEW_STATE = ("fit", "probe", "record"), ("log density", "layout")
RECORD, LOST, REPORT = ("seconds", "setup_seconds", "stop_reason"), "lost_modes", "report"


@dataclass(frozen=True)
class SavedFit:
    """A fit as read from a folder.

    Attributes:
        config: Options, latent sites and the shapes of all weights: what the state belongs to.
        state: The trainer's state under ``"fit"``, a probe of the sampler, the record of the last run, the model's
            `log_density`, and its latent sites.
    """

    config: dict[str, Any]
    state: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> SavedFit:
        """Read a folder that `AVBSVI` wrote.

        Raises:
            CheckpointError: It is damaged, of another kind of fit, or has other entries than this version writes.
        """
        config, state = read_state(folder)
        check_same(config, {"kind": KIND})
        saved = cls(config, state)
        with saved._well_formed():
            saved._check()
        return saved

    def _well_formed(self) -> AbstractContextManager[None]:
        versions = self.config.get("versions")
        theirs = versions.get("implicitvi") if isinstance(versions, dict) else None
        mine = _versions()["implicitvi"]
        return well_formed(f"one that implicitvi {mine} can read (it was written by {theirs or 'another program'})")

    def _check(self) -> None:
        """Raise any error unless every entry is there, none is unknown, and each has a value that can be."""
        _check_names("options", self.config["options"], (*values_of(Settings()), *GUIDE_OPTIONS), NEW_OPTIONS)
        _check_names("entries", self.state, (*STATE, *NEW_STATE), NEW_STATE)
        _check_names("record", record := self.state["record"], (*RECORD, LOST, REPORT), (LOST, REPORT))
        record[LOST] = None if record.get(LOST) is None else tuple(map(int, record[LOST]))
        record[REPORT] = None if record.get(REPORT) is None else Report.from_dict(record[REPORT])
        check_step(self.state["fit"])
        options = {k: v for k, v in self.options.items() if k not in GUIDE_OPTIONS and v not in (OWN_OBJECT, "gated")}
        try:
            Settings(**options)
        except ImplicitVIError as error:
            raise ValueError(f"an option that cannot be: {error}") from error
        float(self.log_density)
        layout_of(self.state.get("layout"))

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.state["fit"]["step"])

    @property
    def layout(self) -> SiteLayout | None:
        """The layout of the latent sites, where the file holds it: a guide can draw with it."""
        return layout_of(self.state.get("layout"))

    @property
    def log_density(self) -> float:
        """The model's `log_density`, NaN in files of the first versions."""
        return float(self.state.get("log density", nan))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the fit and its guide, `OWN_OBJECT` for those that a file cannot hold."""
        options = dict(self.config["options"])
        if options["tempering"] == "auto":  # in the first files: none after a third of the steps
            options["tempering"] = None
        return options

    @property
    def guide_options(self) -> dict[str, Any]:
        """The options of the guide."""
        return {name: self.options[name] for name in GUIDE_OPTIONS}

    def options_with(self, given: Mapping[str, Any], guide: ImplicitGuide | None) -> dict[str, Any]:
        """Return the options of `AVBSVI`, with those given (not ``None``) in place of those that a file cannot hold.

        Raises:
            CheckpointError: One of those is not given.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = {*given, *(() if guide is None else GUIDE_OPTIONS)}
        missing = [k for k, value in self.options.items() if value == OWN_OBJECT and k not in known]
        if missing:
            inside = ", ".join(f"{name}=..." for name in missing if name in GUIDE_OPTIONS)
            again = [f"{name}=..." for name in missing if name not in GUIDE_OPTIONS]
            again += [f"guide=ImplicitGuide(model, {inside})"] if inside else []
            advice = f"Pass them again: AVBSVI.load(folder, model, {', '.join(again)})."
            got = f"none for {', '.join(missing)}"
            raise CheckpointError.must_be("functions of your own, which no file holds,", "given again", got, advice)
        options = {k: value for k, value in (self.options | given).items() if k not in GUIDE_OPTIONS}
        if "adversary" not in given and options["adversary"] == "gated":
            del options["adversary"]
        return options

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless the options that decide results are those of the state."""
        kept = {name for name in self.options if name in _decisive()}
        mine = {name: value for name, value in options.items() if name in kept}
        check_same({"options": {name: self.options[name] for name in kept}}, {"options": mine})

    def restore(self, guide: ImplicitGuide) -> None:
        """Load the weights of a guide that has its networks, and check that they give the draws that they gave.

        Raises:
            CheckpointError: The guide has other latent sites or networks, or the same networks now give other draws.
        """
        with self._well_formed():
            self._restore(guide)

    def _restore(self, guide: ImplicitGuide) -> None:
        check_same(self.config, {"sites": sites(guide)})
        prefix = "module."
        modules = self.state["fit"]["players"]["sampler"]["modules"]
        weights = {k.removeprefix(prefix): v for k, v in modules.items() if k.startswith(prefix)}
        if not guide.is_set_up:  # without the model's arguments only the weights know the dtype
            guide.sampler.to(weights["loc"].dtype)
        guide.split_as(weights.get("weights"))
        check_same({"sampler": _shapes(weights)}, {"sampler": _shapes(guide.sampler.state_dict())})
        guide.sampler.load_state_dict(weights)
        for sampler, probe in zip(_parts(guide.sampler), self.state["probe"], strict=True):
            now, then = _answer(sampler, probe), probe["z"].to(sampler.loc)
            if not torch.allclose(now, then, rtol=0, atol=1e-3 * float(then.abs().max()), equal_nan=True):
                got = f"a difference of {float((now - then).abs().max()):.2g}"
                expected = "those that it gave when it was saved, to a thousandth of their size"
                advice = "Use the version of implicitvi in config.json, and the same sampler."
                raise CheckpointError.must_be("the draws of the sampler", expected, got, advice)


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
    config = {
        "kind": KIND,
        "versions": _versions(),
        "notes": notes,
        "options": options,
        **present_config(guide, trainer),
    }
    report: Report | None = record.get(REPORT)
    record = record | ({} if report is None else {REPORT: report.to_dict()})
    state = {"fit": trainer.state_dict(), "probe": _probe(guide), "record": record, "log density": density}
    state |= {"layout": describe_sites(guide)}
    save_state(folder, state, config=config)


def _check_names(what: str, got: Mapping[str, Any], expected: Sequence[str], new: Sequence[str] = ()) -> None:
    """Raise `ValueError` where names are missing that are not ``new``, or unknown."""
    missing = [name for name in expected if name not in got and name not in new]
    unknown = [name for name in got if name not in expected]
    wrong = [
        f"{word} {', '.join(map(repr, names))}" for word, names in (("no", missing), ("unknown", unknown)) if names
    ]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)} among its {what}")


def log_density(guide: ImplicitGuide, target: Target) -> float:
    """Return the log density of the model's sites, in nats, at a point that a guide keeps, of the first of datasets.

    By it a state recognises its model and data. It is NaN where the model cannot be scored there.
    """
    sampler, layout = guide.sampler, guide.layout
    arguments = target.arguments
    if guide.amortization is not None and guide.amortization.plate is None:
        arguments = dataset(0, arguments)
    u = sampler.loc if isinstance(sampler, Sampler) else sampler.local.loc.new_zeros(layout.dim)
    values, _ = layout.unpack(u)
    args, kwargs = arguments.args, arguments.kwargs
    with torch.no_grad(), RandomStream(0), unvalidated():
        try:
            trace = run_at(target.model, values, *args, **kwargs)
            score(trace, values, sites_without_density(target.model, values, *args, **kwargs))
        except (ModelError, RuntimeError, *PARTICLE_ERRORS):
            return nan
    nodes = trace.nodes.values()
    return float(sum(node["log_prob_sum"].item() for node in nodes if "log_prob_sum" in node))


def check_density(then: float, now: float) -> None:
    """Raise `CheckpointError` where a model's `log_density` has changed; NaN is not compared."""
    if isfinite(then) and not isclose(then, now, rel_tol=1e-4, abs_tol=1e-3):
        got = f"a log density of {now:.6g} for {then:.6g}"
        advice = "Use another folder; to continue with new data, call AVBSVI.load(folder, model).run(...)."
        raise CheckpointError.must_be("the checkpoint", "of the same model and data", got, advice)


def present_config(guide: ImplicitGuide, trainer: Trainer) -> dict[str, Any]:
    """Return what a state must have in common with the guide and the trainer that continue from it."""
    weights: dict[str, Tensor] = {
        f"{player.name}: {name}": tensor
        for player in trainer.players
        for part in player.state_dict().values()
        for name, tensor in part.items()
    }
    return {"sites": sites(guide), "weights": _shapes(weights)}


def made_by(guide: ImplicitGuide, settings: Settings) -> dict[str, Any]:
    """Return the options of `AVBSVI` and of its guide as a file holds them: numbers, words, pairs, `OWN_OBJECT`."""
    options, amortization = values_of(settings), guide.amortization
    if options["adversary"] is GatedAdversary:
        options["adversary"] = "gated"
    ratios = (name for name, kind in RATIOS.items() if options["ratio"] == kind())
    options["ratio"] = next(ratios, options["ratio"])
    kinds = (name for name, kind in SAMPLERS.items() if kind is guide._make_sampler)
    options["sampler"] = next(kinds, OWN_OBJECT)
    options["amortize"] = None if amortization is None else OWN_OBJECT
    if amortization is not None and amortization.features is None:
        options["amortize"] = amortization.plate
    return {name: _plain(value) for name, value in options.items()}


def sites(guide: ImplicitGuide) -> dict[str, list[int | None]]:
    """Return the shapes of the latent sites; the size of the plate that a guide is amortized over is open."""
    return {site.name: list(site.open_shape(guide.plate)) for site in guide.layout.sites}


@cache
def _decisive() -> frozenset[str]:
    """Return the names of the options that decide the numbers of a fit."""
    return frozenset({*values_of(Settings(), decisive=True), *GUIDE_OPTIONS})


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("implicitvi", "pyro-ppl", "torch")}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value if value is None or isinstance(value, bool | int | float | str) else OWN_OBJECT


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _parts(sampler: Sampler | AmortizedSampler) -> list[Sampler]:
    """Return the samplers of shared and local latents, or the only one."""
    if isinstance(sampler, Sampler):
        return [sampler]
    return [part for part in (sampler.shared, sampler.local) if part is not None]


def _probe(guide: ImplicitGuide) -> list[dict[str, Tensor | None]]:
    """Return noise and contexts with the draws that the samplers make of them."""
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
