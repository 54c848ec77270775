"""Build everything that precedes the first step, from top to bottom: target, guide, start, objective, trainer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch import Tensor, nn

from implicitvi.avb.adversaries import InformedAdversary
from implicitvi.avb.conditional import ConditionalContrast, MomentContrast
from implicitvi.avb.contrasts import (
    Contrast,
    DiagonalGaussianContrast,
    FlowContrast,
    GaussianContrast,
    MixtureContrast,
    PriorContrast,
)
from implicitvi.avb.multimodal import MixtureSampler, PerModeContrast
from implicitvi.avb.objective import AVBObjective
from implicitvi.avb.ratios import RATIOS
from implicitvi.avb.samplers import Sampler
from implicitvi.errors import ImplicitVIError, ModelError, OptionError, SetupError, ShapeError
from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.calls import KnownArguments, forms, outside_inference
from implicitvi.inference.gaussian_fit import amortized_gaussian_fit
from implicitvi.inference.guide import ImplicitGuide, restored_on_error
from implicitvi.inference.minibatches import (
    DatasetMinibatches,
    Minibatch,
    MinibatchSource,
    PlateMinibatches,
    count_datasets,
    dataset,
)
from implicitvi.inference.modes import Mode, search_modes
from implicitvi.inference.objective import PosteriorObjective
from implicitvi.inference.own_functions import check_own_functions, own_contrast
from implicitvi.inference.rounds import settled
from implicitvi.inference.settings import ElboSettings, Settings
from implicitvi.inference.start import first_gaussian, starting_point
from implicitvi.numerics.gaussian import moments
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.arguments import Arguments
from implicitvi.pyro_model.compiled import compile_networks
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.prior import ModelPrior
from implicitvi.pyro_model.target import Target
from implicitvi.pyro_model.tracing import first_line
from implicitvi.rng import RandomStream
from implicitvi.training import Trainer
from implicitvi.training.history import History
from implicitvi.training.schedule import HORIZON, Schedule

NOISE_DRAWS = 16  # minibatches from which the noise of their gradient is estimated
PROBES = 16  # draws of which at least one should have a density for each datum
PRIOR_DRAWS = 1000  # from which location and scale of a prior are estimated


class Training:
    """An objective with its trainer, bound to the model's arguments of the latest call.

    Attributes:
        target: The model at these arguments.
        objective: The objective.
        trainer: The loop, with its players, step count and history.
    """

    def __init__(
        self,
        target: Target,
        objective: PosteriorObjective,
        guide: ImplicitGuide,
        settings: ElboSettings,
        stream: RandomStream,
        *,
        moves_sampler: bool,
    ):
        self.target = target
        self.objective = objective
        self._known = KnownArguments(target.arguments)
        self._parts = (guide, settings, moves_sampler)
        self.trainer = Trainer(
            objective.players(lambda: self.target, with_sampler=moves_sampler),
            schedule=settled(settings.schedule, target, objective),
            stream=stream,
            clip_norm=settings.clip_norm,
            max_skips=settings.max_skips,
            explain=lambda: objective.explain(self.target),
        )

    def bind(self, arguments: Arguments) -> None:
        """Use these arguments of the model from now on.

        Raises:
            ModelError: They are on another device than those of the first call, or cannot be fitted by the guide.
        """
        if self._known.are_last(arguments):
            return
        arguments = outside_inference(arguments)
        if not self._known.cover(arguments):
            self._check(arguments)
        self._known.add(arguments)
        self.target = self.target.at(arguments)

    def _check(self, arguments: Arguments) -> None:
        """Read the model at other arguments, as before the first step, without the fit's random numbers."""
        first, guide = self._known.first, self._parts[0]
        if arguments.tensors() and arguments.devices() != first.devices():
            expected, got = (", ".join(sorted(each.devices())) for each in (first, arguments))
            what, advice = "the model's arguments", "Move them back; a fit stays on the device of its first call."
            raise ModelError.must_be(what, f"on {expected}", got, advice, faq="tensors-on-different-devices")
        one, model = arguments, self.target.model
        problem: Exception | None = None
        if guide.amortization is not None and guide.plate is None:
            count_datasets(arguments)
            one = dataset(0, arguments)
        near = InitMessenger(init_to_value(values=self.target.values))(model)
        for each in (model, near):  # a draw of the prior may be one at which a model cannot run
            try:
                with poutine.block(), torch.no_grad(), RandomStream(0), _one_device(arguments):
                    return guide.build(Target(each, one, plate=guide.plate))
            except ImplicitVIError:
                raise
            except Exception as error:  # whatever a model does with arguments that it does not take
                problem = problem or error
        got = f"{forms(arguments)}, at which it raised {first_line(problem) if problem else None}"
        advice = "Call it with these arguments to see the error, and pass those that it takes."
        what, expected = "the model's arguments", f"like those of the first call, {forms(first)}"
        raise ModelError.must_be(what, expected, got, advice, faq="sites-or-shapes-have-changed") from problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the parts of a copy: its players are made again, of its own objective."""
        if self.objective.parameters:
            names, advice = ", ".join(map(repr, self.objective.parameters)), "Use AVBSVI.save and AVBSVI.load."
            got = f"{names}, which Pyro keeps outside of it"
            raise ModelError.must_be("the model of a fit that is copied", "without parameters", got, advice)
        parts = (self.target, self.objective, *self._parts, self.trainer.stream, self.trainer.state_dict())
        return _copied, parts


def _copied(
    target: Target,
    objective: PosteriorObjective,
    guide: ImplicitGuide,
    settings: ElboSettings,
    moves_sampler: bool,
    stream: RandomStream,
    state: dict[str, Any],
) -> Training:
    training = Training(target, objective, guide, settings, stream, moves_sampler=moves_sampler)
    training.trainer.load_state_dict(state)
    return training


class TrainingHolder:
    """A holder of a `Training`, whose parts are properties once the model has been seen.

    Attributes:
        settings: The options.
    """

    settings: Settings
    _training: Training | None = None

    @property
    def schedule(self) -> Schedule:
        """Settings of every step."""
        return self.settings.schedule if self._training is None else self.trainer.schedule

    @property
    def trainer(self) -> Trainer:
        """The loop, with its players, step count and history."""
        return self._bound.trainer

    @property
    def objective(self) -> PosteriorObjective:
        """The objective, with sampler, contrast and adversary."""
        return self._bound.objective

    @property
    def target(self) -> Target:
        """The model bound to the arguments of the latest call."""
        return self._bound.target

    @property
    def log_joint(self) -> LogJoint:
        """The model's `LogJoint`; its ``mode`` and ``reason`` tell how the model is scored."""
        source = self.objective.source
        return self.target.log_joint if source is None else source.log_joint

    @property
    def history(self) -> History:
        """Metrics of every step so far."""
        return self.trainer.history

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on: networks, optimisers, step, random numbers, history."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; call `setup` with the model's arguments first."""
        self.trainer.load_state_dict(state)

    @property
    def _bound(self) -> Training:
        if self._training is None:
            advice = "Call run, step, or setup with the model's arguments first."
            raise SetupError(f"The fit must see its model first. {advice}")
        return self._training


def set_up(
    model: Model,
    guide: ImplicitGuide,
    settings: ElboSettings,
    arguments: Arguments,
    stream: RandomStream,
    *,
    moves_sampler: bool,
) -> Training:
    """Read the model, build the guide's networks, place the sampler, and make objective, players and trainer.

    Args:
        model: The Pyro model.
        guide: Its guide.
        settings: The options.
        arguments: The model's arguments.
        stream: The random numbers of the fit.
        moves_sampler: Whether the sampler is one of the trainer's players; otherwise another optimiser moves it.

    Raises:
        ModelError: The model cannot be fitted, or is not the guide's.
    """
    check_guide(guide)
    target = Target(model, outside_inference(arguments), mode=settings.mode, plate=guide.plate)
    with all_or_nothing(guide, model), stream, _one_device(arguments):
        build = _posterior_objective if guide.amortization is None else _amortized_objective
        target, objective = build(target, guide, settings)
        if not list(guide.sampler.parameters()):
            raise OptionError.must_be("the sampler", "one with weights to train", type(guide.sampler).__name__)
    return Training(target, objective, guide, settings, stream, moves_sampler=moves_sampler)


@contextmanager
def all_or_nothing(guide: ImplicitGuide, model: Model) -> Iterator[None]:
    """Leave guide and parameters as they were where an error or an interrupt ends the block."""
    store = pyro.get_param_store()
    own = [*model.parameters()] if isinstance(model, nn.Module) else []
    names, leaves = set(store), [*(leaf for _, leaf in store.named_parameters()), *own]
    values = [leaf.detach().clone() for leaf in leaves]
    try:
        with restored_on_error(guide):
            yield
    except BaseException:
        for name in set(store) - names:
            del store[name]
        with torch.no_grad():
            for leaf, value in zip(leaves, values, strict=True):
                leaf.copy_(value)
        raise


def check_guide(guide: object) -> None:
    """Raise `OptionError` unless ``guide`` is an `ImplicitGuide`."""
    if not isinstance(guide, ImplicitGuide):
        advice = "Write guide = ImplicitGuide(model); pyro.infer.SVI trains other guides."
        raise OptionError.must_be("guide", "an ImplicitGuide", type(guide).__name__, advice)


@contextmanager
def _one_device(arguments: Arguments) -> Iterator[None]:
    """Raise `ModelError` where the model mixes tensors of different devices."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ImplicitVIError) or not re.search("(same|expected|different) device", str(error)):
            raise
        got = f"{first_line(error)}, with arguments on {', '.join(sorted(arguments.devices()))}"
        advice = "Make constants from the data, as in dist.Normal(y.new_tensor(0.0), 1.0), or move the data."
        what, expected = "all tensors of the model", "on one device"
        raise ModelError.must_be(what, expected, got, advice, faq="tensors-on-different-devices") from error


def _posterior_objective(
    target: Target, guide: ImplicitGuide, settings: ElboSettings
) -> tuple[Target, PosteriorObjective]:
    """Return the target and the objective of a guide of one posterior."""
    guide.build(target)
    check_own_functions(settings, guide.sampler.loc)
    target = target.near(guide.layout.unpack(guide.sampler.loc)[0])
    parameters = target.parameters
    _check_prior(target, settings)
    start = starting_point(target.loop, guide.sampler.loc, target.describe)
    around = start + 0.1 * torch.randn(3, target.layout.dim).to(start)
    target.log_joint.choose(around, *target.args, **target.kwargs)
    if settings.compile is not None:
        target.log_joint.compile(settings.compile, around, *target.args, **target.kwargs)
    prior = target.prior(start) if settings.contrast == "prior" else None
    if not guide.sampler.initialised:
        _place(target, guide, settings, start, prior)
    sampler: Sampler = guide.sampler
    contrast = _contrast_of(sampler, settings) if prior is None else _prior_contrast(prior)
    network = settings.adversary(target.layout.dim + contrast.extra_dim)
    avb = _avb(sampler, contrast, network, settings, informed=settings.informed)
    objective = PosteriorObjective(sampler, avb, parameters=parameters)
    guide.set_log_density(partial(objective.log_q, target), partial(objective.log_ratio, target))
    _warn_of_noise(objective, target, settings.num_steps or HORIZON)
    return target, objective


def _place(
    target: Target, guide: ImplicitGuide, settings: ElboSettings, start: Tensor, prior: ModelPrior | None
) -> None:
    """Give the sampler the location and scale of a Gaussian fit, and each far mode a sampler of its own."""
    modes = [Mode(1.0, start, torch.eye(len(start)).to(start))]
    if target.sites_without_density:  # without the density of its prior a posterior has no Gaussian fit
        assert prior is not None
        modes = [Mode(1.0, *moments(prior.sample((PRIOR_DRAWS,))))]
    elif settings.warm_start:
        leaves = list(target.parameters.values())
        loc, scale_tril, ends = first_gaussian(target, start, parameters=leaves, num_steps=settings.warm_start)
        modes = [Mode(1.0, loc, scale_tril)]
        # a sampler that draws in its own way would be passed over by a mixture
        draws_itself = type(guide.sampler).forward is not Sampler.forward
        if not leaves and prior is None and not draws_itself:
            modes = search_modes(target, loc, scale_tril, ends, max_modes=settings.max_modes)
    guide.split(modes)


def _amortized_objective(
    target: Target, guide: ImplicitGuide, settings: ElboSettings
) -> tuple[Target, PosteriorObjective]:
    """Return the target and the objective of the latents of every datum, or of every dataset."""
    amortization = guide.amortization
    assert amortization is not None
    if settings.contrast == "prior":
        advice = "Use contrast='mixture', or 'moments' with sampler='noise_basis'."
        raise OptionError.must_be("the contrast of an amortized guide", "adaptive", "'prior'", advice)
    if settings.compile is not None:
        warnings.warn(
            f"compile={settings.compile!r} is for guides of one posterior: the model of an amortized guide is scored "
            "as it is",
            stacklevel=6,
        )
    arguments = target.arguments
    source: MinibatchSource
    if amortization.plate is not None:
        guide.build(target)
        source = PlateMinibatches(target.model, amortization, mode=settings.mode)
    else:
        count_datasets(arguments)
        target = target.at(dataset(0, arguments))
        _build_for_dataset(guide, target)
        source = DatasetMinibatches(target.model, amortization, guide.layout, mode=settings.mode)
    sampler: AmortizedSampler = guide.sampler
    check_own_functions(settings, sampler.local.loc, sampler.local.context_dim)
    batch = source.batch(arguments)
    if amortization.plate is None and not sampler.local.initialised:
        sampler.set_units(batch.rows)
    with torch.no_grad():
        g, z = sampler(1, batch.rows)
    parameters = target.near(batch.values(g, z, guide.layout)).parameters
    local = _avb_of_local(sampler, batch, g, settings)
    shared = None if sampler.shared is None else _avb_of_shared(sampler.shared, settings)
    objective = PosteriorObjective(sampler, shared, local, source, parameters)
    _check_terms(source, sampler, batch, source.terms(g, z, batch))
    if not sampler.local.initialised:
        amortized_gaussian_fit(sampler, source, arguments, list(parameters.values()), num_steps=settings.warm_start)
    return target.at(arguments), objective


def _build_for_dataset(guide: ImplicitGuide, target: Target) -> None:
    """Build a guide with the first of stacked datasets.

    Raises:
        ShapeError: The model or the features do not take it, as where the arguments are not stacked.
    """
    try:
        guide.build(target)
    except (IndexError, TypeError) as error:
        if isinstance(error, TypeError) and "0-d tensor" not in str(error):
            raise
        shapes = ", ".join(str(tuple(t.shape)) for t in target.arguments.tensors())
        got = f"{first_line(error)}, with tensors of shape {shapes} of the first dataset"
        advice = "Stack the arguments of the datasets with torch.stack; guide.sample takes those of one."
        raise ShapeError.must_be("stacked datasets", "tensors [M, ...] of M datasets each", got, advice) from error


def _avb_of_local(
    sampler: AmortizedSampler, batch: Minibatch, g: Tensor | None, settings: ElboSettings
) -> AVBObjective:
    """Return the objective of the latents of one datum."""
    local = sampler.local
    contrast: Contrast
    if settings.contrast == "moments":
        local.moments(2, sampler.context(batch.rows, g))
        contrast = MomentContrast(local.moments)
    else:
        contrast = ConditionalContrast(_contrast(local.latent_dim, settings), local.frame)
    network = settings.adversary(local.latent_dim + contrast.extra_dim, context_dim=local.context_dim)
    return _avb(local, contrast, network, settings, informed=settings.informed)


def _avb_of_shared(shared: Sampler, settings: ElboSettings) -> AVBObjective:
    """Return the objective of the latents that all data share."""
    contrast = _contrast(shared.latent_dim, settings)
    network = settings.adversary(shared.latent_dim + contrast.extra_dim)
    return _avb(shared, contrast, network, settings, informed=False)


def _avb(
    sampler: Sampler, contrast: Contrast, network: nn.Module, settings: ElboSettings, *, informed: bool
) -> AVBObjective:
    """Return an objective with these networks, on the sampler's device and in its dtype."""
    avb = AVBObjective(
        sampler=sampler,
        contrast=contrast.to(sampler.loc),
        adversary=(InformedAdversary(network) if informed else network).to(sampler.loc),
        ratio=RATIOS[settings.ratio]() if isinstance(settings.ratio, str) else settings.ratio,
        averaging=settings.averaging,
        num_importance=settings.num_importance,
    )
    if settings.compile == "inductor" and sampler.loc.is_cuda:
        compile_networks(sampler, avb.adversary, avb.average)  # gains nothing on the CPU
    return avb


def _contrast_of(sampler: Sampler, settings: ElboSettings) -> Contrast:
    """Return the contrast beside a sampler, with one for each of its far modes."""
    if not isinstance(sampler, MixtureSampler):
        return _contrast(sampler.latent_dim, settings)
    parts = [_contrast(sampler.latent_dim, settings) for _ in sampler.samplers]
    return PerModeContrast(parts, sampler.weights, *sampler.frames())


def _contrast(dim: int, settings: ElboSettings) -> Contrast:
    """Return the contrast beside ``dim`` latents."""
    if not isinstance(settings.contrast, str):
        return own_contrast(settings.contrast, dim)
    made: dict[str, Callable[[], Contrast]] = {
        "diagonal": DiagonalGaussianContrast,
        "gaussian": GaussianContrast,
        "mixture": lambda: MixtureContrast(dim),
        "flow": lambda: FlowContrast(dim),
    }
    if settings.contrast not in made:
        advice = "Use contrast='mixture', or ImplicitGuide(model, amortize=...)."
        raise OptionError.must_be("contrast", "one for guides of one posterior", repr(settings.contrast), advice)
    return made[settings.contrast]()


def _prior_contrast(prior: ModelPrior) -> PriorContrast:
    draws = prior.sample((PRIOR_DRAWS,))
    return PriorContrast(prior, loc=draws.mean(0), scale=draws.std(0))


def _check_prior(target: Target, settings: ElboSettings) -> None:
    """Raise `ModelError` for priors without a density unless the prior is the contrast, for flat ones if it is."""
    implicit, got = target.sites_without_density, f"contrast={settings.contrast!r}"
    if implicit and settings.contrast != "prior":
        what = f"the contrast of sites whose prior has no density, {', '.join(map(repr, implicit))},"
        advice = "Use contrast='prior', which learns the ratio of posterior to prior from draws of both."
        raise ModelError.must_be(what, "the prior", got, advice, faq="a-distribution-has-no-density")
    if settings.contrast == "prior" and target.flat_sites:
        what = f"the prior of {', '.join(map(repr, target.flat_sites))}"
        advice = "Use contrast='mixture', or give every latent site a proper prior."
        raise ModelError.must_be(what, "one that can be drawn from, not a flat one masked by False", got, advice)


def _check_terms(source: MinibatchSource, sampler: AmortizedSampler, batch: Minibatch, terms: Tensor) -> None:
    """Raise `ModelError` where the log density ``terms [S, 1 + B]`` of a datum is NaN for these and other draws."""
    if not terms.isnan().any():
        return
    with torch.no_grad(), RandomStream(0):
        g, z = sampler(PROBES, batch.rows)
        shared, *rows = source.terms(g, z, batch).isnan().all(0).tolist()
    if shared or any(rows):
        got = f"NaN for {sum(rows)} of {len(rows)} rows" + (", and outside of them" if shared else "")
        advice = "Look for NaN among the data: drop those, fill them in, or mask them with poutine.mask."
        raise ModelError.must_be("the log density of the model", "a number at some draw", got, advice)


def _warn_of_noise(objective: PosteriorObjective, target: Target, num_steps: int) -> None:
    """Warn where minibatches leave the posterior of shared latents to chance.

    In units where the posterior has variance 1, a step's gradient at its centre should be 0; with minibatches it has a
    standard deviation ``σ``, and the average of ``T`` steps still has ``σ / sqrt(T)``: no fit can place the posterior
    better. Of ``B`` of ``N`` rows without a control variate ``σ`` is about ``sqrt(N / B)``.
    """
    minibatches = target.log_joint.minibatches
    if not minibatches:
        return
    centre = objective.sampler.loc.new_zeros(1, target.layout.dim).requires_grad_()
    gradients = []
    for _ in range(NOISE_DRAWS):
        score = target(objective.sampler.to_latent(centre)).sum()
        gradients.append(torch.autograd.grad(score, centre)[0])
    error = torch.stack(gradients).std(0).max().item() / num_steps**0.5
    if error > 0.25:
        rows = ", ".join(f"{b} of the {n} rows of {name!r}" for name, (n, b) in minibatches.items())
        warnings.warn(
            f"{num_steps} steps with {rows} leave the posterior uncertain by about {error:.1g} of its standard "
            "deviations: use larger minibatches, more steps, or a control variate",
            stacklevel=6,
        )
