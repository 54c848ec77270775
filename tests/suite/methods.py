"""What is compared: the defaults of this package, variants with one choice changed, and peers.

A method is ``method(target, seed=…, quick=…) -> {site: [S, ...]}``, as many draws as the target asks for; ``quick``
takes a few steps only, to see that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import Distribution

from implicitvi import AVBSVI, Fit, ImplicitGuide
from implicitvi.avb.contrasts import MixtureContrast
from implicitvi.nn import zuko_imported
from implicitvi.pyro_model.log_joint import LogJoint
from suite.denoising import denoised
from suite.target import Sites, Target

Method = Callable[..., Sites]
STEPS, PARTICLES = 4000, 32  # of every variational peer
QUICK_STEPS = 20
REFINED = ("resample", "polish")
SHORT = 500  # steps of a fit that leaves something to be refined
CONTRASTS = ("prior", "diagonal", "gaussian", "flow")  # beside the mixture


def fitted(target: Target, *, seed: int, quick: bool, sampler: str = "gated", **options: Any) -> Fit:
    """A fit by this package with its defaults, or with ``options``."""
    if quick:
        options |= {"num_steps": QUICK_STEPS, "warm_start": 1}
    torch.manual_seed(seed)
    guide = ImplicitGuide(target.model, sampler=sampler)
    return AVBSVI(target.model, guide, seed=seed, progress=False, **options).run(*target.args)


def implicit(target: Target, **options: Any) -> Sites:
    """Draws of a fit with the defaults, or with ``options``."""
    return fitted(target, **options).guide.sample(target.num_draws)


def refined(target: Target, *, how: str, **options: Any) -> Sites:
    """The draws of the defaults, weighed anew or moved on."""
    draws: Sites = getattr(fitted(target, **options), how)(num_samples=target.num_draws).draws
    return draws


class NoAdversary(nn.Module):
    """Says nothing to the sampler, which follows the slope of a score: this one has none. The contrast stands alone."""

    def __init__(self, latent_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.weight * z.detach().sum(-1)


class Whole(MixtureContrast):
    """Shows the adversary a draw as the whole mixture sees it, and not as its own component does."""

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.extra_dim = 0

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        return super().standardise(z, r)[..., : z.shape[-1]]


def autoguide(target: Target, *, seed: int, quick: bool, make: Callable[[Any], Any], rate: float = 5e-2) -> Sites:
    """A guide of Pyro's, by Adam with a rate that falls a hundredfold."""
    torch.manual_seed(seed)
    pyro.clear_param_store()
    steps = QUICK_STEPS if quick else STEPS
    guide = make(target.model)
    optimiser = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)})
    # the particles stand to the left of the one plate that a model here has
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(target.model, guide, optimiser, loss=loss)
    for _ in range(steps):
        with suppress(torch.linalg.LinAlgError):  # a particle so far out that a kernel has no factor
            svi.step(*target.args)
    with torch.no_grad(), pyro.plate("draws", target.num_draws, dim=-2):
        sites = guide(*target.args)
    pyro.clear_param_store()
    return {site.name: sites[site.name].reshape(target.num_draws, *site.shape) for site in target.layout.sites}


def spline(target: Target, *, seed: int, quick: bool) -> Sites:
    """A neural spline flow of zuko in its inverse autoregressive direction, in an affine frame that is learned too."""
    torch.manual_seed(seed)
    steps = QUICK_STEPS if quick else STEPS
    layout = target.layout
    log_joint = LogJoint(target.model, layout)
    with zuko_imported() as zuko:
        flow = zuko.flows.NSF(layout.dim, transforms=4, hidden_features=(64, 64), randperm=layout.dim > 1)
    loc = torch.zeros(layout.dim, requires_grad=True)
    log_scale = torch.full((layout.dim,), -2.0, requires_grad=True)
    affine, weights = [loc, log_scale], list(flow.parameters())
    parameters = weights + affine
    optimiser = torch.optim.Adam([{"params": weights}, {"params": affine, "lr": 5e-2}], lr=5e-3)
    cooling = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.01 ** (1 / steps))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        eps = torch.randn(count, layout.dim)
        x, log_det = flow.transform().call_and_ladj(eps)
        entropy = 0.5 * eps.square().sum(-1) + log_det + log_scale.sum()
        return loc + log_scale.exp() * x, entropy

    for _ in range(steps):
        u, entropy = draw(PARTICLES)
        loss = -(log_joint(u, *target.args) + entropy).mean()
        optimiser.zero_grad()
        if loss.isfinite():
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 10.0)
            optimiser.step()
        cooling.step()
    with torch.no_grad():
        return layout.unpack(draw(target.num_draws)[0])[0]


def nuts(target: Target, *, seed: int, quick: bool) -> Sites:
    """The No-U-Turn sampler, one chain, after 500 draws of warm-up."""
    torch.manual_seed(seed)
    warm_up, keep = (10, 60) if quick else (500, target.num_draws)
    kernel = NUTS(target.model, max_tree_depth=3 if quick else 10)
    chain = MCMC(kernel, num_samples=keep, warmup_steps=warm_up, disable_progbar=True)
    chain.run(*target.args)
    draws: Sites = chain.get_samples()
    return draws


PEERS: dict[str, Method] = {
    "meanfield": partial(autoguide, make=AutoNormal),
    "gaussian": partial(autoguide, make=AutoMultivariateNormal),
    "iaf": partial(autoguide, make=partial(AutoIAFNormal, hidden_dim=[64, 64], num_transforms=4), rate=1e-2),
    "spline": spline,
    "nuts": nuts,
}
ABLATIONS: dict[str, Method] = {
    **{f"contrast={name}": partial(implicit, contrast=name) for name in CONTRASTS},
    "informed": partial(implicit, informed=True),
    **{f"contrast={name}, informed": partial(implicit, contrast=name, informed=True) for name in CONTRASTS},
    **{how: partial(refined, how=how) for how in REFINED},
    f"{SHORT} steps": partial(implicit, num_steps=SHORT),
    **{f"{SHORT} steps, {how}": partial(refined, how=how, num_steps=SHORT) for how in REFINED},
    "rounds": partial(implicit, num_steps=None),
    "tempered": partial(implicit, tempering=0.1),
    "whole coordinates": partial(implicit, contrast=Whole),
    "uncooled": partial(implicit, lr=1e-3, adversary_lr=4e-3),
    "mixture alone": partial(implicit, adversary=NoAdversary),
    "flow alone": partial(implicit, contrast="flow", adversary=NoAdversary),
    "semi-implicit": partial(implicit, sampler="semi_implicit"),
    "denoised": denoised,
    "more adversary late": partial(implicit, adversary_steps=(3, 6), num_particles=(448, 2048)),
}
OURS: dict[str, Method] = {"implicit": implicit}
METHODS: dict[str, Method] = {**OURS, **PEERS, **ABLATIONS}
