"""Laws of the VAE objectives: values of their losses, the parameters that gradients reach, what each one refuses."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from implicitvi.avb.contrasts import DiagonalGaussianContrast
from implicitvi.avb.ratios import FGanKL
from implicitvi.errors import ImplicitVIError
from implicitvi.training import Stage
from implicitvi.training.player import Metrics
from implicitvi.vae.distributions import Implicit
from implicitvi.vae.encoders import ConditionalGaussian, DeterministicEncoder, GaussianEncoder
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.model import LatentModel
from implicitvi.vae.objectives.aae import AAE
from implicitvi.vae.objectives.ali import ALI
from implicitvi.vae.objectives.asvae import ASVAE
from implicitvi.vae.objectives.auxiliary import AuxiliaryVAE
from implicitvi.vae.objectives.avb import AVB
from implicitvi.vae.objectives.biadversarial import BiadversarialVAE
from implicitvi.vae.objectives.marginal_asvae import MarginalASVAE
from implicitvi.vae.objectives.pairs import kl_bound, parted, slope
from implicitvi.vae.objectives.vae import VAE
from tables import PARTS, Lookup, TableContrast, Tables, entropy, expectation, jensen_shannon, kl
from vae_contracts import (
    SYSTEMS,
    A,
    X,
    Z,
    bernoulli_decoder,
    data,
    decoder,
    deterministic_encoder,
    explicit_encoder,
    implicit_decoder,
    implicit_encoder,
    loss_of,
    of_codes,
    of_data,
    of_pairs,
    prior_draws,
    shaken,
    stage,
)

# Identities: on finite alphabets, with exact adversaries, the loss of a batch is the number the theory says.
#
# Each entry: a model with its optimal adversaries (times a sign, for the planted bug), and what the losses of its
# players, by name, are worth.

Case = Callable[[Tables, float], tuple[LatentModel, dict[str, Tensor]]]


def product(t: Tables) -> Tensor:
    """``q(x) p(z)``."""
    return t.z[:, None] * t.x


def avb(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    ratio = t.q.log() - product(t).log()
    model = AVB(*t.networks(), Lookup(sign * ratio), informed=False)
    return model, {"adversary": 2 * log(2) - 2 * jensen_shannon(t.q, product(t)), "model": -t.elbo}


def avb_f_gan(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    ratio = t.q.log() - product(t).log()
    model = AVB(*t.networks(), Lookup(1 + sign * ratio), informed=False, ratio="fgan_kl")
    return model, {"adversary": -kl(t.q, product(t)), "model": -t.elbo}


def aae(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    ratio = t.q_z.log() - t.z.log()
    middle = (t.q_z + t.z) / 2
    return AAE(*t.networks(), Lookup(sign * ratio)), {
        "model": -expectation(t.q, t.x_given_z.log()),
        "adversary": 2 * log(2) - 2 * jensen_shannon(t.q_z, t.z),
        # -E_q log(p / (p + q)), the published generator's
        "generator": -expectation(t.q_z, t.z.log() - middle.log()) + log(2),
    }


def ali(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    both = 2 * jensen_shannon(t.q, t.p)
    return ALI(*t.networks(), Lookup(sign * (t.q.log() - t.p.log()))), {
        "adversary": log(4) - both,
        "model": log(4) + kl(t.q, t.p) + kl(t.p, t.q) - both,
    }


def asvae(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    of_encoder = t.q.log() - (t.z[:, None] * t.p_x).log()
    of_decoder = t.p.log() - (t.q_z[:, None] * t.x).log()
    model = ASVAE(*t.networks(), Lookup(sign * of_encoder), Lookup(sign * of_decoder))
    of_data = expectation(t.x, t.p_x.log()) - kl(t.q, t.p)
    of_codes = expectation(t.z, t.q_z.log()) - kl(t.p, t.q)
    return model, {"model": -of_data - of_codes, "data_term": of_data, "code_term": of_codes}


def marginal_asvae(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    ratio = t.x.log() - t.contrast.log()
    encoder, decoder, prior = t.networks()
    model = MarginalASVAE(encoder, decoder, prior, Lookup(sign * ratio), contrast=TableContrast(t.contrast), weight=0.7)
    return model, {
        "adversary": 2 * log(2) - 2 * jensen_shannon(t.x, t.contrast),
        "model": 0.7 * kl(t.p, t.q) - t.elbo,
        "elbo": t.elbo,
        "reverse_kl": kl(t.p, t.q),
    }


def biadversarial(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    """As published: the f-GAN form, and its identity ``V₁ + V₂ = -ELBO - H(x) + I(x; z)``."""
    model, values = biadversarial_logistic(t, sign)
    for adversary in (model.code_adversary, model.data_adversary):
        adversary.scores.data += 1
    model.ratio = FGanKL(limit=50.0)
    return model, values | {"adversary": -values["code_bound"] - values["data_bound"]}


def biadversarial_logistic(t: Tables, sign: float) -> tuple[LatentModel, dict[str, Tensor]]:
    fake = t.q_z[:, None] * t.x_given_z
    of_codes, of_data = t.q.log() - product(t).log(), t.q.log() - fake.log()
    model = BiadversarialVAE(*t.networks(), Lookup(sign * of_codes), Lookup(sign * of_data), limit=50.0)
    information = kl(t.q, t.q_z[:, None] * t.x)
    return model, {
        "adversary": log(16) - 2 * jensen_shannon(t.q, product(t)) - 2 * jensen_shannon(t.q, fake),
        "model": -t.elbo - entropy(t.x) + information,
        "code_bound": expectation(t.x, (t.z_given_x * (t.z_given_x / t.z).log()).sum(-1)),
        "data_bound": kl(t.q, fake),
    }


CASES: dict[str, Case] = {
    "AVB": avb,
    "AVB, f-GAN": avb_f_gan,
    "AAE": aae,
    "ALI": ali,
    "ASVAE": asvae,
    "MarginalASVAE": marginal_asvae,
    "BiadversarialVAE": biadversarial,
    "BiadversarialVAE, logistic": biadversarial_logistic,
}


def values_of(model: LatentModel, t: Tables) -> dict[str, Tensor]:
    """Loss of each player, and what it shows besides, in expectation."""
    seen: dict[str, Tensor] = {}
    for player in model.players(t.batch):
        loss, metrics = next(player.losses(stage(PARTS)))
        seen |= {player.name: loss} | metrics
    return seen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", CASES)
def test_at_the_optimal_adversary_every_loss_is_what_theory_says(name: str, seed: int) -> None:
    t = Tables(seed)
    model, expected = CASES[name](t, 1.0)
    seen = values_of(model, t)
    for what, value in expected.items():
        torch.testing.assert_close(seen[what].detach(), value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_identities_catch_a_wrong_sign(name: str) -> None:
    """The planted bug: with adversaries of the opposite sign every player that asks them is off."""
    t = Tables(0)
    model, expected = CASES[name](t, -1.0)
    seen = values_of(model, t)
    untouched = {"AAE": {"model"}, "MarginalASVAE": {"elbo"}}.get(name, set())
    for what in expected.keys() - untouched:
        assert (seen[what] - expected[what]).abs() > 1e-3, what


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"ASVAE"}))
def test_the_optimal_adversary_has_nothing_to_learn(name: str) -> None:
    """The gradient of its loss in every score is zero, and is not where draws of the two kinds change places."""
    t = Tables(1)
    for sign, still in ((1.0, True), (-1.0, False)):
        model, _ = CASES[name](t, sign)
        player = next(p for p in model.players(t.batch) if p.name == "adversary")
        loss, _ = next(player.losses(stage(PARTS)))
        gradients = torch.autograd.grad(loss, player.parameters())
        assert all((g.abs().max() < 1e-12) == still for g in gradients)


def test_the_terms_of_the_asvae_sum_to_the_symmetric_divergence() -> None:
    """And two log likelihoods, which the adversaries hold fixed."""
    t = Tables(2)
    model, _ = asvae(t, 1.0)
    of_data, of_codes = (term.mean() for term in model.terms(t.batch(), PARTS))
    symmetric = kl(t.q, t.p) + kl(t.p, t.q)
    fits = expectation(t.x, t.p_x.log()) + expectation(t.z, t.q_z.log())
    torch.testing.assert_close(fits - of_data - of_codes, symmetric, rtol=0, atol=1e-9)


def test_the_adversaries_of_the_asvae_are_shown_the_right_pairs() -> None:
    """Encoder and decoder copy, so a pair that belongs together has equal halves: first its own, then another's."""
    seen: dict[str, list[bool]] = {"encoder": [], "decoder": []}

    def witness(name: str) -> nn.Module:
        class Witness(nn.Module):
            def forward(self, z: Tensor, x: Tensor) -> Tensor:
                if len(x) == 3:  # the trial when the model is made
                    return z.sum(-1)
                match = torch.isclose(z, x.expand(z.shape), atol=1e-3).all(-1)
                assert match.all() or match.float().mean() < 0.1
                seen[name].append(bool(match.all()))
                return z.sum(-1) * 0

        return Witness()

    class Copy(nn.Module):
        def forward(self, given: Tensor) -> Independent:
            return Independent(Normal(given, 1e-5), 1)

    model = ASVAE(Copy(), Copy(), 2, witness("encoder"), witness("decoder"))
    x = torch.randn(200, 2)
    (adversary, _) = model.players(lambda: x)
    next(adversary.losses(stage(3)))
    assert seen == {"encoder": [True, False], "decoder": [True, False]}


# Oracle: linear Gaussian networks and Gaussian data, whose joints are Gaussians of five dimensions. With the exact
# adversary the objective of each draw is the analytic integrand.


class Affine(nn.Module):
    """``N(W v + b, s²)``, seen from outside as ``[..., K]`` to a distribution over ``[..., L]``."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def forward(self, given: Tensor) -> Independent:
        return Independent(Normal(given @ self.weight.mT + self.bias, self.scale), 1)

    def joint(self, given: MultivariateNormal) -> MultivariateNormal:
        """Of what is given and what comes of it, ``[K + L]``."""
        cross = self.weight @ given.covariance_matrix
        own = cross @ self.weight.mT + self.scale.square().diag()
        loc = torch.cat([given.loc, self.weight @ given.loc + self.bias])
        return MultivariateNormal(
            loc, torch.cat([torch.cat([given.covariance_matrix, cross.mT], 1), torch.cat([cross, own], 1)])
        )


class Linear:
    """Gaussian data ``[3]`` and codes ``[2]``, encoder and decoder, and all log densities of pairs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.data = MultivariateNormal(random(3), torch.eye(3) + 0.2 * (r := random(3, 3)) @ r.mT)
        self.prior = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        self.encoder = Affine(0.5 * random(2, 3), random(2), 0.5 + random(2).square())
        self.decoder = Affine(random(3, 2), random(3), 0.5 + random(3).square())
        self.of_encoder = self.encoder.joint(self.data)  # of x, then z
        self.of_decoder = self.decoder.joint(self.prior)  # of z, then x
        self.x = self.data.sample((50,))
        self.shown: list[tuple[Tensor, ...]] = []

    def log_q(self, z: Tensor, x: Tensor) -> Tensor:
        return self.of_encoder.log_prob(torch.cat([x.expand(*z.shape[:-1], 3), z], -1))

    def log_p(self, z: Tensor, x: Tensor) -> Tensor:
        return self.of_decoder.log_prob(torch.cat([z, x.expand(*z.shape[:-1], 3)], -1))

    def log_q_z(self, z: Tensor) -> Tensor:
        return marginal(self.of_encoder, slice(3, 5)).log_prob(z)

    def log_p_x(self, x: Tensor) -> Tensor:
        return marginal(self.of_decoder, slice(2, 5)).log_prob(x)

    def oracle(self, score: Callable[..., Tensor]) -> nn.Module:
        """An adversary that remembers what it was shown."""
        shown = self.shown

        class Oracle(nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                first = inputs[0]
                if 3 in first.shape[:-1]:  # the trial when the model is made; the laws use other numbers of rows
                    return first.sum(-1)
                shown.append(inputs)
                return score(*inputs)

        return Oracle()


def marginal(joint: MultivariateNormal, part: slice) -> MultivariateNormal:
    return MultivariateNormal(joint.loc[part], joint.covariance_matrix[part, part])


def exactly(seen: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("contrast", ["prior", "gaussian"])
def test_oracle_avb(contrast: str) -> None:
    m = Linear()
    log_prior = m.prior.log_prob

    def score(z: Tensor, x: Tensor) -> Tensor:
        log_q = m.log_q(z, x) - m.data.log_prob(x)
        return log_q - (log_prior(z) if contrast == "prior" else model.r.log_prob(z))

    model = AVB(m.encoder, m.decoder, m.prior, m.oracle(score), contrast="prior", informed=False)
    if contrast == "gaussian":
        model = AVB(m.encoder, m.decoder, m.prior, m.oracle(score), contrast=Remembered(), informed=False)
        model.r = model._objective.contrast
    torch.manual_seed(0)
    seen = model.learned_elbo(m.x, 7)
    ((z, x),) = m.shown
    exactly(seen, m.log_p(z, x) + m.data.log_prob(x) - m.log_q(z, x))


def test_avb_validates_with_whole_groups_of_importance_draws() -> None:
    """The bound is ``log mean exp`` of four weights of each datum; a fit with held-out data records it."""
    m = Linear()
    score = m.oracle(lambda z, x: m.log_q(z, x) - m.data.log_prob(x) - m.prior.log_prob(z))
    model = AVB(m.encoder, m.decoder, m.prior, score, num_importance=4)
    bound = model.learned_elbo(m.x)
    ((z, x),) = m.shown
    assert len(z) == 4
    weights = m.log_p(z, x) + m.data.log_prob(x) - m.log_q(z, x)
    exactly(bound, weights.logsumexp(0, keepdim=True) - log(4))
    assert [len(model.learned_elbo(m.x, count)) for count in (4, 5, 8)] == [1, 2, 2]
    model = AVB(implicit_encoder(), bernoulli_decoder(), Z, of_pairs(), num_importance=4)
    fit = model.fit(data(), validation=data(8), epochs=2, progress=False, seed=0)
    assert np.isfinite(fit.validation["learned_elbo"]).all() and len(fit.validation["learned_elbo"]) == 2


class Remembered(DiagonalGaussianContrast):
    """Remembers what it returned, and leaves the adversary's input as it is."""

    def forward(self, z: Tensor, x: Tensor | None = None) -> Distribution:
        self.r = super().forward(z, x)
        return self.r

    def log_prob(self, z: Tensor) -> Tensor:
        return self.r.log_prob(z)

    def standardise(self, z: Tensor, r: Distribution) -> Tensor:
        return z


def test_oracle_asvae() -> None:
    """``log p(x)`` less the log ratio of the joints at pairs of the encoder, and the same from the other side."""
    m = Linear()
    of_encoder = m.oracle(lambda z, x: m.log_q(z, x) - m.log_p_x(x) - m.prior.log_prob(z))
    of_decoder = m.oracle(lambda z, x: m.log_p(z, x) - m.log_q_z(z) - m.data.log_prob(x))
    of_data, of_codes = ASVAE(m.encoder, m.decoder, m.prior, of_encoder, of_decoder).terms(m.x, 7)
    (z, x), (z_p, x_p) = m.shown
    assert z.shape == (7, 50, 2) and z_p.shape == (350, 2) and x_p.shape == (350, 3)
    exactly(of_data, m.log_p_x(x) + m.log_p(z, x) - m.log_q(z, x))
    exactly(of_codes, m.log_q_z(z_p) + m.log_q(z_p, x_p) - m.log_p(z_p, x_p))


def test_oracle_marginal_asvae() -> None:
    m = Linear()
    contrast, prior = Remembered(), Kept(m.prior.loc, m.prior.covariance_matrix)
    adversary = m.oracle(lambda x: m.data.log_prob(x) - contrast.log_prob(x))
    model = MarginalASVAE(m.encoder, m.decoder, prior, adversary, contrast=contrast)
    seen = model.reverse(m.x, 60)
    ((x,),) = m.shown
    exactly(seen, m.log_p(prior.draws, x) - m.log_q(prior.draws, x))


class Kept(MultivariateNormal):
    """Remembers its draws."""

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        self.draws = super().sample(sample_shape)
        return self.draws


def test_oracle_biadversarial() -> None:
    m = Linear()

    def of_codes(z: Tensor, x: Tensor) -> Tensor:
        return m.log_q(z, x) - m.data.log_prob(x) - m.prior.log_prob(z)

    def of_data(z: Tensor, x: Tensor) -> Tensor:
        return m.log_q(z, x) - m.log_q_z(z) - m.log_p(z, x) + m.prior.log_prob(z)

    model = BiadversarialVAE(m.encoder, m.decoder, m.prior, m.oracle(of_codes), m.oracle(of_data))
    z = model.encoder(m.x).rsample((7,))
    codes_real, codes_other = model.code_ratios(z, m.x)
    data_real, data_fake = model.data_ratios(z, m.x)
    (_, _), (other, x), (_, _), (rows, fake) = m.shown
    exactly(codes_real, model.encoder(m.x).log_prob(z) - m.prior.log_prob(z))
    exactly(codes_other, model.encoder(x).log_prob(other) - m.prior.log_prob(other))
    # the two together: -elbo - log q(x) + pointwise mutual information, draw by draw
    information = m.log_q(z, m.x) - m.log_q_z(z) - m.data.log_prob(m.x)
    elbo = m.log_p(z, m.x) - model.encoder(m.x).log_prob(z)
    exactly(codes_real + data_real, -elbo + m.data.log_prob(m.x) + information)
    posterior = m.log_q(rows, fake) - m.log_q_z(rows)
    exactly(data_fake, posterior - model.decoder(rows).log_prob(fake))


def test_oracle_ali() -> None:
    """Both players' losses are the cross-entropy of the exact posterior probability of either joint."""
    m = Linear()
    model = ALI(m.encoder, m.decoder, m.prior, m.oracle(lambda z, x: m.log_q(z, x) - m.log_p(z, x)))
    adversary, networks = model.players(lambda: m.x)
    for player, swapped in ((adversary, False), (networks, True)):
        m.shown.clear()
        loss, _ = next(player.losses(stage(7)))
        of_encoder, of_decoder = sorted(m.shown, key=lambda pair: -pair[0].dim())
        first, second = (torch.logaddexp(m.log_q(*pair), m.log_p(*pair)) for pair in (of_encoder, of_decoder))
        right, wrong = (m.log_p, m.log_q) if swapped else (m.log_q, m.log_p)
        exactly(loss, (first - right(*of_encoder)).mean() + (second - wrong(*of_decoder)).mean())


def test_oracle_aae() -> None:
    m = Linear()
    adversary = m.oracle(lambda z: m.log_q_z(z) - m.prior.log_prob(z))
    _, _, generator = AAE(m.encoder, m.decoder, m.prior, adversary).players(lambda: m.x)
    loss, _ = next(generator.losses(stage(7)))
    ((z,),) = m.shown
    both = torch.logaddexp(m.log_q_z(z), m.prior.log_prob(z))
    exactly(loss, (both - m.prior.log_prob(z)).mean())


# Every model of the list.


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_stay_home(name: str) -> None:
    """Every parameter of a player gets a gradient from its loss, and an adversary's loss moves nobody else."""
    model = shaken(name)
    assert strays(model) == []
    players = model.players(data)
    assert {p for player in players for p in player.parameters()} == set(model.parameters())


def strays(model: LatentModel) -> list[str]:
    """Parameters that get no gradient from the loss of their player, or one from that of another's adversary."""
    x = data()
    wrong = []
    for player in model.players(lambda: x):
        own = set(player.parameters())
        names, parameters = zip(*model.named_parameters(), strict=True)
        given = torch.autograd.grad(loss_of(player), parameters, allow_unused=True)
        for name, parameter, gradient in zip(names, parameters, given, strict=True):
            moved = gradient is not None and gradient.isfinite().all() and gradient.any()
            if parameter in own and not moved:
                wrong.append(f"{player.name} does not move {name}")
            if parameter not in own and gradient is not None and player.name == "adversary":
                wrong.append(f"{player.name} moves {name}")
    return wrong


def test_the_law_of_gradients_catches_a_leak() -> None:
    """The planted bug: an adversary whose draws keep their gradients, and a generator that loses them."""

    class Leaky(AAE):
        def _adversary_loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
            return self.adversary(self._codes(x, stage)).mean(), {}

    class Cut(AAE):
        def _generator_loss(self, x: Tensor, stage: Stage) -> tuple[Tensor, Metrics]:
            return self.adversary(self._codes(x, stage).detach()).mean(), {}

    parts = deterministic_encoder(), bernoulli_decoder(), Z, of_codes()
    leaky, cut = Leaky(*parts), Cut(*parts)
    for parameter in leaky.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    assert "adversary moves encoder.network.0.weight" in strays(leaky)
    with pytest.raises(RuntimeError, match="does not require grad|not have been used"):
        cut.adversary.requires_grad_(False)
        strays(cut)


def fitted(name: str, seed: int = 0) -> tuple[LatentModel, VAEFit]:
    torch.manual_seed(0)
    model = SYSTEMS[name]()
    options = {"epochs": 4, "batch_size": 8, "num_particles": 2, "progress": False}
    return model, model.fit(data(), validation=data(16, seed=1), seed=seed, **options)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_objective_trains(name: str) -> None:
    model, fit = fitted(name)
    assert fit.stop_reason == "finished" and fit.skipped == 0
    for player in model.players(data):
        losses = fit.history[player.name]
        assert len(losses) == 20 and np.isfinite(losses).all()
    for figures in fit.validation.values():
        assert len(figures) == 4 and np.isfinite(figures).all()
    x = data(6)
    shapes = {
        "codes": (model.encode(x, num_samples=5), (5, 6, Z)),
        "a code each": (model.encode(x), (6, Z)),
        "back": (model.reconstruct(x), (6, X)),
        "new": (model.sample(7), (7, X)),
    }
    for value, shape in shapes.values():
        assert value.shape == shape and value.isfinite().all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_seed_gives_the_same_numbers(name: str) -> None:
    (first, fit), (second, again) = fitted(name), fitted(name)
    assert all(np.array_equal(fit.history[n], again.history[n]) for n in fit.history.names())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    _, other = fitted(name, seed=1)
    losses = [n for n in fit.history.names() if n not in ("beta", "dropped")]
    assert not any(np.array_equal(fit.history[n], other.history[n]) for n in losses)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_copy_of_a_model_owns_all_its_parts(name: str) -> None:
    """A running average is a copy: what it says must not depend on what becomes of the original."""
    model = shaken(name).eval()
    copy = deepcopy(model)
    expected = said(copy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert said(copy) == expected != said(model)


def said(model: LatentModel) -> dict[str, float]:
    torch.manual_seed(0)
    return {key: float(value) for key, value in model.validate(data()).items()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_state_of_a_model_is_all_of_it(name: str) -> None:
    model, _ = fitted(name)
    torch.manual_seed(5)
    copy = SYSTEMS[name]().eval()
    copy.load_state_dict(model.state_dict())
    drawn = []
    for each in (model, copy):
        torch.manual_seed(2)
        drawn.append((each.reconstruct(data()), each.sample(5)))
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


class DrawsOnly(nn.Module):
    """``p(a | x, z)`` that is known by its draws alone."""

    def forward(self, z: Tensor, x: Tensor) -> Implicit:
        return Implicit(lambda shape: torch.zeros(*shape, 2, A), [2], [A])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "AAE without reconstruction": (
        lambda: AAE(explicit_encoder(), implicit_decoder(), Z, of_codes()),
        "decoder of AAE must have a density",
    ),
    "ALI of binary data": (
        lambda: ALI(explicit_encoder(), bernoulli_decoder(), Z, of_pairs()),
        r"decoder of ALI must have gradients .*likelihood='straight_through'",
    ),
    "ALI, weight": (
        lambda: ALI(explicit_encoder(), decoder(), Z, of_pairs(), cycle=-1.0),
        "cycle must be .* >= 0, got -1.0",
    ),
    "ASVAE, encoder": (
        lambda: ASVAE(implicit_encoder(), decoder(), Z, of_pairs(), of_pairs()),
        "encoder of ASVAE must have a density",
    ),
    "ASVAE, decoder": (
        lambda: ASVAE(explicit_encoder(), implicit_decoder(), Z, of_pairs(), of_pairs()),
        "decoder of ASVAE must have a density",
    ),
    "ASVAE of binary data": (
        lambda: ASVAE(explicit_encoder(), bernoulli_decoder(), Z, of_pairs(), of_pairs()),
        "decoder of ASVAE must have gradients .*likelihood='straight_through'",
    ),
    "MarginalASVAE, prior": (
        lambda: MarginalASVAE(explicit_encoder(), decoder(), prior_draws, of_data()),
        "prior of MarginalASVAE must have a density",
    ),
    "MarginalASVAE, encoder": (
        lambda: MarginalASVAE(deterministic_encoder(), decoder(), Z, of_data()),
        "encoder of MarginalASVAE must have a density",
    ),
    "BiadversarialVAE of binary data": (
        lambda: BiadversarialVAE(implicit_encoder(), bernoulli_decoder(), Z, of_pairs(), of_pairs()),
        "decoder of BiadversarialVAE must have gradients .*likelihood='straight_through'",
    ),
    "BiadversarialVAE, ratio": (
        lambda: BiadversarialVAE(implicit_encoder(), implicit_decoder(), Z, of_pairs(), of_pairs(), ratio="fgan"),
        "ratio must be one of .*'fgan_kl', .*got 'fgan'. Did you mean 'fgan_kl'",
    ),
    "AuxiliaryVAE, first": (
        lambda: auxiliary(encoder=DeterministicEncoder(nn.Linear(X, A))),
        r"first encoder q\(a \| x\) of AuxiliaryVAE must have a density",
    ),
    "AuxiliaryVAE, last": (
        lambda: auxiliary(auxiliary=DrawsOnly()),
        r"auxiliary p\(a \| x, z\) of AuxiliaryVAE must have a density",
    ),
    "AuxiliaryVAE, dimensions": (
        lambda: auxiliary(auxiliary=ConditionalGaussian(nn.Linear(Z + X, 4))),
        "Dimensions of a in encoder and auxiliary must be equal, got 3 and 2",
    ),
    "VAE without a density": (
        lambda: VAE(implicit_encoder(), bernoulli_decoder(), Z),
        "encoder of VAE must have a density",
    ),
    "a single datum": (lambda: parted(torch.zeros(3, 1, Z)), "rows of a batch must be 2 or more"),
}


def auxiliary(**changed: nn.Module) -> AuxiliaryVAE:
    given = {
        "encoder": GaussianEncoder(nn.Linear(X, 2 * A)),
        "decoder": bernoulli_decoder(),
        "prior": Z,
        "second": ConditionalGaussian(nn.Linear(A + X, 2 * Z)),
        "auxiliary": ConditionalGaussian(nn.Linear(Z + X, 2 * A)),
    }
    return AuxiliaryVAE(**given | changed)


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_objective_cannot_use_is_refused_by_name(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ImplicitVIError, match=words):
        make()


# Pairs and bounds.


def test_no_code_stays_with_its_datum() -> None:
    """Nor any two that were together part: whatever the draw, and each other datum is as likely."""
    torch.manual_seed(0)
    z = torch.arange(5.0)[None, :, None].expand(3, 5, 1)
    seen = torch.zeros(5, 5)
    for _ in range(2000):
        given = parted(z)
        assert torch.equal(given[0], given[2])
        assert sorted(given[0, :, 0].tolist()) == [0, 1, 2, 3, 4]
        seen[torch.arange(5), given[0, :, 0].long()] += 1
    assert (seen.diagonal() == 0).all()
    others = seen[~torch.eye(5, dtype=torch.bool)]
    assert (others / 2000 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_the_slope_of_an_adversary_is_that_of_its_scores() -> None:
    class Known(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 3 * z.sum(-1) + (x**2).sum(-1)

    x = torch.randn(6, X)
    expected = 9 * Z + (2 * x).square().sum(-1).mean()
    torch.testing.assert_close(slope(Known(), torch.randn(6, Z), x), expected)


def test_the_exponential_of_a_bound_is_capped_above_its_limit_alone() -> None:
    real, fake = torch.randn(100), torch.randn(100).clamp(max=1.0)
    assert kl_bound(real, fake, limit=1.0) == kl_bound(real, fake)
    far = torch.tensor([1e4], requires_grad=True)
    (slope_there,) = torch.autograd.grad(kl_bound(real, far, limit=1.0), far)
    torch.testing.assert_close(slope_there, -torch.tensor([1.0]).exp())


def test_an_f_gan_adversary_that_has_overshot_finds_its_way_back() -> None:
    """Its exponential would overflow, and every later step be skipped."""
    score = torch.tensor([500.0], requires_grad=True)
    loss = FGanKL().loss(torch.zeros(1), score)
    (gradient,) = torch.autograd.grad(loss, score)
    assert loss.isfinite() and gradient.isfinite() and gradient > 0
