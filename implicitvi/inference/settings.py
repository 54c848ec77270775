"""The options that `AVBSVI` and `AVB_ELBO` share, and what is made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from implicitvi.avb.adversaries import GatedAdversary, InformedAdversary
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
from implicitvi.avb.ratios import RATIOS, RatioLoss
from implicitvi.avb.samplers import Sampler
from implicitvi.errors import ImplicitVIError, ModelError, OptionError, ShapeError, check_choice, check_whole
from implicitvi.inference.amortization import AmortizedSampler
from implicitvi.inference.amortized_objective import AmortizedProblem
from implicitvi.inference.gaussian_fit import gaussian_fit, settle, starting_point
from implicitvi.inference.guide import ImplicitGuide
from implicitvi.inference.minibatches import DatasetSource, Minibatch, PlateSource, Source, count_datasets, dataset
from implicitvi.inference.modes import Mode, find_modes, wide_starts
from implicitvi.inference.objective import Arguments, Problem
from implicitvi.numerics.gaussian import moments
from implicitvi.numerics.types import Model
from implicitvi.pyro_model.checks import check_latents, latent_trace
from implicitvi.pyro_model.compiled import check_compile, compile_networks
from implicitvi.pyro_model.log_joint import LogJoint
from implicitvi.pyro_model.parameters import model_parameters
from implicitvi.pyro_model.prior import ModelPrior
from implicitvi.pyro_model.sites import plate_names
from implicitvi.pyro_model.tracing import PARTICLE_ERRORS, first_line, flat_sites, sites_without_density
from implicitvi.rng import RandomStream, forked

STARTS = 32  # of each kind, from which far modes are looked for
NOISE_DRAWS = 16  # minibatches from which the noise of their gradient is read
PROBES = 16  # draws of which one at least should have a density for each datum
CONTRASTS = ("mixture", "gaussian", "diagonal", "flow", "moments", "prior")


@dataclass(frozen=True)
class ProblemOptions:
    """What the objective is made of; the words are those of `AVBSVI`."""

    contrast: str | Callable[[int], Contrast] = "mixture"
    adversary: Callable[..., nn.Module] = GatedAdversary
    informed: bool = False
    ratio: str | RatioLoss = "logistic"
    averaging: float = 0.9
    warm_start: int = 600
    max_modes: int = 8
    num_importance: int = 1
    mode: str = "auto"
    compile: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.contrast, str):
            check_choice("contrast", self.contrast, CONTRASTS)
        if isinstance(self.ratio, str):
            check_choice("ratio", self.ratio, RATIOS)
        check_whole("warm_start", self.warm_start, 0)
        check_whole("max_modes", self.max_modes)
        check_whole("num_importance", self.num_importance)
        check_compile(self.compile)
        if not 0 <= self.averaging < 1:
            raise OptionError("averaging is out of range", got=self.averaging, expected="0 to below 1")

    def build(
        self, model: Model, guide: ImplicitGuide, arguments: Arguments, *, num_steps: int
    ) -> Problem | AmortizedProblem:
        """Set the guide up, choose how to score the model, place the sampler, make the networks.

        Args:
            model: The Pyro model.
            guide: Its guide.
            arguments: The model's arguments.
            num_steps: Horizon of the fit, to judge minibatches by.

        Raises:
            ModelError: The model cannot be fitted, or is not the guide's.
        """
        try:
            if guide.amortization is not None:
                return self._build_amortized(model, guide, arguments)
            problem = self._build_single(model, guide, arguments)
        except RuntimeError as error:
            if isinstance(error, ImplicitVIError) or " device" not in str(error):
                raise
            raise ModelError(
                "the model mixes tensors of different devices",
                got=f"{first_line(error)}, with arguments on {', '.join(sorted(arguments.devices()))}",
                do="Make its constants from its data, as in dist.Normal(y.new_tensor(0.0), 1.0), or move the data.",
                faq="tensors-on-different-devices",
            ) from error
        warn_of_noise(problem, num_steps)
        return problem

    def _build_single(self, model: Model, guide: ImplicitGuide, arguments: Arguments) -> Problem:
        """The problem of one posterior."""
        args, kwargs = arguments.args, arguments.kwargs
        guide.setup(*args, **kwargs)
        check_match(model, guide, arguments)
        sampler, layout = guide.sampler, guide.layout
        values, _ = layout.unpack(sampler.loc)
        parameters = model_parameters(model, values, *args, **kwargs)
        implicit = self._check_prior(model, values, arguments)
        log_joint = LogJoint(model, layout, mode=self.mode, exclude=implicit)

        def score(u: Tensor) -> Tensor:
            return log_joint(u, *args, **kwargs)

        start = starting_point(
            lambda u: log_joint.loop(u, *args, **kwargs), sampler.loc, lambda u: log_joint.describe(u, *args, **kwargs)
        )
        around = start + 0.1 * torch.randn(3, layout.dim).to(start)
        log_joint.choose(around, *args, **kwargs)
        if self.compile is not None:
            log_joint.compile(self.compile, around, *args, **kwargs)
        prior = None
        if self.contrast == "prior":
            log_prior = LogJoint(model, layout, mode=self.mode, only=layout.names, exclude=implicit)
            prior = ModelPrior(log_prior, args, kwargs, start)
        if not sampler.initialised:
            sampler.set_affine(start, torch.eye(layout.dim).to(start))
            if implicit:  # a posterior without the density of its prior has no Gaussian fit
                assert prior is not None
                sampler.set_affine(*moments(prior.sample((1000,))))
            elif self.warm_start:
                leaves = list(parameters.values())
                place = gaussian_fit(score, start, parameters=leaves, num_steps=self.warm_start)
                if not log_joint.minibatches:  # of which every look sees another posterior
                    with RandomStream(0):  # the fit's own numbers do not depend on the look
                        place = settle(score, *place)
                sampler.set_affine(*place)
                if not leaves and prior is None:
                    sampler = guide.split(self._modes(log_joint, sampler, arguments))
        contrast = self._contrast_of(sampler) if prior is None else _prior_contrast(prior)
        network = self.adversary(layout.dim + contrast.extra_dim)
        avb = self._avb(sampler, contrast, network, informed=self.informed)
        problem = Problem(log_joint, avb, arguments, parameters)
        guide.set_log_density(problem.log_q, problem.log_ratio)
        return problem

    def _build_amortized(self, model: Model, guide: ImplicitGuide, arguments: Arguments) -> AmortizedProblem:
        """The problem of the latents of every datum, or of every dataset."""
        amortization = guide.amortization
        assert amortization is not None
        if self.contrast == "prior":
            raise OptionError(
                "the contrast of an amortized guide cannot be the prior",
                got="'prior'",
                do="Use contrast='mixture', or 'moments' with sampler='noise_basis'.",
            )
        if self.compile is not None:
            warnings.warn(
                f"compile={self.compile!r} is for guides of one posterior: the model of an amortized guide is scored "
                "as it is",
                stacklevel=5,
            )
        args, kwargs = arguments.args, arguments.kwargs
        source: Source
        if amortization.plate is not None:
            guide.setup(*args, **kwargs)
            source = PlateSource(model, amortization, mode=self.mode)
        else:
            count_datasets(args, kwargs)
            args, kwargs = dataset(0, args, kwargs)
            _setup_one(guide, args, kwargs)
            source = DatasetSource(model, amortization, guide.layout, mode=self.mode)
        check_match(model, guide, Arguments(args, kwargs))
        sampler = guide.sampler
        assert isinstance(sampler, AmortizedSampler)
        batch = source.batch(*arguments.args, **arguments.kwargs)
        if amortization.plate is None and not sampler.local.initialised:
            sampler.set_units(batch.rows)
        with torch.no_grad():
            g, z = sampler(1, batch.rows)
        values = batch.values(g, z, guide.layout)
        parameters = model_parameters(model, values, *args, **kwargs)
        local, shared = sampler.local, sampler.shared
        framed: Contrast
        if self.contrast == "moments":
            local.moments(2, sampler.context(batch.rows, g))
            framed = MomentContrast(local.moments)
        else:
            framed = ConditionalContrast(self._contrast(local.latent_dim), local.frame)
        network = self.adversary(local.latent_dim + framed.extra_dim, context_dim=local.context_dim)
        problem = AmortizedProblem(
            source=source,
            sampler=sampler,
            local=self._avb(local, framed, network, informed=self.informed),
            shared=None if shared is None else self._avb_of_shared(shared),
            parameters=parameters,
        )
        _check_terms(source, sampler, batch, source.terms(g, z, batch))
        if not sampler.local.initialised:
            problem.warm_start(arguments, num_steps=self.warm_start)
        return problem

    def _avb_of_shared(self, shared: Sampler) -> AVBObjective:
        """The objective of the latents that all data share."""
        contrast = self._contrast(shared.latent_dim)
        network = self.adversary(shared.latent_dim + contrast.extra_dim)
        return self._avb(shared, contrast, network, informed=False)

    def _avb(self, sampler: Sampler, contrast: Contrast, network: nn.Module, *, informed: bool) -> AVBObjective:
        """An objective with these networks, on the sampler's device and in its dtype."""
        avb = AVBObjective(
            sampler=sampler,
            contrast=contrast.to(sampler.loc),
            adversary=(InformedAdversary(network) if informed else network).to(sampler.loc),
            ratio=RATIOS[self.ratio]() if isinstance(self.ratio, str) else self.ratio,
            averaging=self.averaging,
            num_importance=self.num_importance,
        )
        if self.compile == "inductor" and sampler.loc.is_cuda:
            compile_networks(sampler, avb.adversary, avb.average)  # on the CPU this gains nothing
        return avb

    def _modes(self, log_joint: LogJoint, sampler: Sampler, arguments: Arguments) -> list[Mode]:
        """The far modes of a posterior whose sampler has been placed by a Gaussian fit."""
        place = Mode(1.0, sampler.loc, sampler.scale_tril)
        args, kwargs = arguments.args, arguments.kwargs
        # a mixture would pass over a sampler's own way of drawing
        own_way = type(sampler).forward is not Sampler.forward
        # one particle at a time it would take minutes; of a minibatch every look sees another landscape
        if self.max_modes == 1 or own_way or log_joint.mode == "loop" or log_joint.minibatches:
            return [place]
        # the fit's own numbers do not depend on whether modes were looked for
        with forked():
            starts = wide_starts(place.loc, place.scale_tril, STARTS)
            with suppress(RuntimeError, *PARTICLE_ERRORS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prior = ModelPrior(log_joint, args, kwargs, place.loc)
                starts = torch.cat([starts, prior.sample((STARTS,))])
            return find_modes(
                lambda u: log_joint(u, *args, **kwargs),
                place.loc,
                place.scale_tril,
                starts,
                max_modes=self.max_modes,
                num_steps=self.warm_start // 2,
            )

    def _contrast_of(self, sampler: Sampler) -> Contrast:
        """The contrast beside a sampler: one for each of its far modes."""
        if not isinstance(sampler, MixtureSampler):
            return self._contrast(sampler.latent_dim)
        parts = [self._contrast(sampler.latent_dim) for _ in sampler.samplers]
        return PerModeContrast(parts, sampler.weights, *sampler.frames())

    def _contrast(self, dim: int) -> Contrast:
        """The contrast beside ``dim`` latents."""
        if not isinstance(self.contrast, str):
            return self.contrast(dim)
        made: dict[str, Callable[[], Contrast]] = {
            "diagonal": DiagonalGaussianContrast,
            "gaussian": GaussianContrast,
            "mixture": lambda: MixtureContrast(dim),
            "flow": lambda: FlowContrast(dim),
        }
        if self.contrast not in made:
            raise OptionError(
                "this contrast is for amortized guides",
                got=repr(self.contrast),
                do="Use contrast='mixture', or ImplicitGuide(model, amortize=...).",
            )
        return made[self.contrast]()

    def _check_prior(self, model: Model, values: dict[str, Tensor], arguments: Arguments) -> tuple[str, ...]:
        """Names of sites that can only be drawn: refused unless the prior is the contrast, flat ones if it is."""
        implicit = sites_without_density(model, values, *arguments.args, **arguments.kwargs)
        if implicit and self.contrast != "prior":
            raise ModelError(
                f"the prior of {', '.join(map(repr, implicit))} can be drawn from but has no density, which a contrast "
                "that adapts to the posterior needs",
                got=f"contrast={self.contrast!r}",
                do="Use contrast='prior': the ratio of posterior to prior is learned from draws of both.",
                faq="a-distribution-has-no-density",
            )
        if self.contrast == "prior":
            flat = flat_sites(model, values, *arguments.args, **arguments.kwargs)
            if flat:
                raise ModelError(
                    f"the prior of {', '.join(map(repr, flat))} is flat, masked by False: there are no draws of it",
                    got="contrast='prior'",
                    do="Use contrast='mixture', or give every latent site a proper prior.",
                )
        return implicit


def _setup_one(guide: ImplicitGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set a guide up with the first of stacked datasets; what is no stack has too few dimensions for the model."""
    try:
        guide.setup(*args, **kwargs)
    except (IndexError, TypeError) as error:
        if isinstance(error, TypeError) and "0-d tensor" not in str(error):
            raise
        shapes = [tuple(t.shape) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        raise ShapeError(
            "model or features do not take the first of the datasets that are stacked in the arguments",
            got=f"{first_line(error)}, with tensors of shape {', '.join(map(str, shapes))}",
            expected="stacked datasets, tensors [M, ...] of M datasets each",
            do="Stack the arguments of the datasets with torch.stack; guide.sample takes those of one.",
        ) from error


def _check_terms(source: Source, sampler: AmortizedSampler, batch: Minibatch, terms: Tensor) -> None:
    """Raise `ModelError` where the log density ``terms [S, 1 + B]`` of a datum is NaN, and is for other draws too."""
    if not terms.isnan().any():
        return
    with torch.no_grad(), RandomStream(0):
        g, z = sampler(PROBES, batch.rows)
        shared, *rows = source.terms(g, z, batch).isnan().all(0).tolist()
    if shared or any(rows):
        raise ModelError(
            "the log density of the model is NaN whatever is drawn",
            got=f"{sum(rows)} such rows of {len(rows)}" + (", and outside of them" if shared else ""),
            do="Look for NaN among the data: drop those, fill them in, or mask them with poutine.mask.",
        )


def _prior_contrast(prior: ModelPrior) -> PriorContrast:
    draws = prior.sample((1000,))
    return PriorContrast(prior, loc=draws.mean(0), scale=draws.std(0))


def check_devices(arguments: Arguments, first: Arguments) -> None:
    """Raise `ModelError` where the model's arguments are elsewhere than at the first call."""
    if arguments.devices() != first.devices():
        raise ModelError(
            "the model's arguments have moved to another device",
            got=", ".join(sorted(arguments.devices())),
            expected=", ".join(sorted(first.devices())),
            do="Move them back; a fit stays on the device that it began on.",
            faq="tensors-on-different-devices",
        )


def warn_of_noise(problem: Problem, num_steps: int) -> None:
    """Warn where minibatches leave the posterior of shared latents to chance.

    In units where the posterior has variance 1, a step's gradient at its centre should be 0; with minibatches it has a
    standard deviation ``σ``, and the average of ``T`` steps still has ``σ / sqrt(T)``: no fit can place the posterior
    better. Of ``B`` of ``N`` rows without a control variate ``σ`` is about ``sqrt(N / B)``.
    """
    minibatches = problem.log_joint.minibatches
    if not minibatches:
        return
    centre = problem.avb.sampler.loc.new_zeros(1, problem.log_joint.layout.dim).requires_grad_()
    gradients = []
    for _ in range(NOISE_DRAWS):
        score = problem.scorer(problem.arguments)(problem.avb.sampler.to_latent(centre)).sum()
        gradients.append(torch.autograd.grad(score, centre)[0])
    error = torch.stack(gradients).std(0).max().item() / num_steps**0.5
    if error > 0.25:
        rows = ", ".join(f"{b} of the {n} rows of {name!r}" for name, (n, b) in minibatches.items())
        warnings.warn(
            f"{num_steps} steps with {rows} leave the posterior uncertain by about {error:.1g} of its standard "
            "deviations: take larger minibatches, more steps, or a control variate",
            stacklevel=5,
        )


def check_guide(guide: Any) -> None:
    """Raise `OptionError` unless ``guide`` is an `ImplicitGuide`."""
    if not isinstance(guide, ImplicitGuide):
        raise OptionError(
            "the guide is not implicit",
            got=type(guide).__name__,
            expected="an ImplicitGuide",
            do="Write guide = ImplicitGuide(model); other guides are trained by pyro.infer.SVI.",
        )


def check_match(model: Model, guide: ImplicitGuide, arguments: Arguments) -> None:
    """Raise `ModelError` unless the latent sites of ``model`` are those of the guide."""
    trace = latent_trace(model, *arguments.args, **arguments.kwargs)
    check_latents(trace, amortized=guide.plate)

    def shape(full: tuple[int, ...], dims: tuple[str | None, ...]) -> tuple[int | None, ...]:
        """Without the size of the amortized plate, which may change."""
        fixed = (None if d is not None and d == guide.plate else n for n, d in zip(full, dims, strict=False))
        return (*fixed, *full[len(dims) :])

    found = {name: shape(tuple(node["value"].shape), plate_names(node)) for name, node in trace.iter_stochastic_nodes()}
    known = {site.name: shape(site.shape, site.dims) for site in guide.layout.sites}
    if found != known:
        raise ModelError(
            "the latent sites of the model are not those of the guide",
            got=found,
            expected=known,
            do="Give ImplicitGuide and AVBSVI the same model, and data of the same size.",
            faq="sites-or-shapes-have-changed",
        )
