"""Symmetric equilibrium learning: laws on tables and Gaussians, then what training makes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, MultivariateNormal, Normal, OneHotCategorical

from example_code import definitions
from implicitvi.errors import ModelError, OptionError, ShapeError
from implicitvi.nn import mlp
from implicitvi.training import Schedule, Stage, StopTraining, Trainer
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder
from implicitvi.vae.distributions import Implicit, StraightThroughBernoulli
from implicitvi.vae.encoders import BinaryEncoder
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.ladder import LadderEncoder, LadderPrior, LowerLevel
from implicitvi.vae.objectives.symmetric import SymmetricVAE
from implicitvi.vae.objectives.vae import VAE

STAGE = Schedule(num_steps=1, num_particles=1, tempering=None).at(0)
exact: dict[str, Any] = {"rtol": 0, "atol": 1e-9}


# Tables: every conditional of one-hot x and one-hot z, summed without any draw.


class Table(nn.Module):
    """A conditional distribution of one-hot vectors given one-hot vectors, one row of logits for each."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, given: Tensor) -> Distribution:
        return OneHotCategorical(logits=given @ self.logits, validate_args=False)

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)


class TablePrior(nn.Module):
    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self) -> Distribution:
        return OneHotCategorical(logits=self.logits, validate_args=False)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


K, L = 5, 4  # values of x and of z


class Game:
    """A table for encoder, decoder, prior and data, with the exact utilities of the model that trains them."""

    def __init__(self, seed: int, *, learned_prior: bool = False):
        logits = random(L, seed=seed + 1)
        prior = TablePrior(logits) if learned_prior else OneHotCategorical(logits=logits)
        self.data = random(K, seed=seed).softmax(0)
        self.pi_z = logits.softmax(0)
        self.encoder = Table(random(K, L, seed=seed + 2))
        self.decoder = Table(random(L, K, seed=seed + 3))
        self.model = SymmetricVAE(self.encoder, self.decoder, prior)
        x, z = torch.eye(K).double(), torch.eye(L).double()
        self.pairs = z.repeat(K, 1), x.repeat_interleave(L, 0)  # all pairs, row by row of [K, L]

    @property
    def q(self) -> Tensor:
        """``data(x) q(z | x)``: ``[K, L]``."""
        return self.data[:, None] * self.encoder.probs

    @property
    def p(self) -> Tensor:
        """``p(z) p(x | z)``: ``[K, L]``."""
        return (self.model.prior().probs[:, None] * self.decoder.probs).T

    def decoder_utility(self) -> Tensor:
        return (self.q.detach().flatten() * self.model.decoder_utility(*self.pairs)).sum()

    def encoder_utility(self) -> Tensor:
        return (self.p.detach().flatten() * self.model.encoder_utility(*self.pairs)).sum()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of each player's utility in its own logits."""
        (of_decoder,) = torch.autograd.grad(self.decoder_utility(), self.decoder.logits)
        (of_encoder,) = torch.autograd.grad(self.encoder_utility(), self.encoder.logits)
        return of_decoder, of_encoder

    def settle(self) -> None:
        """Both players' conditionals of one joint of data and prior, found by best responses: Sinkhorn's iteration."""
        with torch.no_grad():
            for _ in range(500):
                self.decoder.logits.copy_(self.q.T.log())  # softmax over x: q(x, z) / q(z)
                self.encoder.logits.copy_(self.p.log())


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum()


def entropy(a: Tensor) -> Tensor:
    return -(a * a.log()).sum()


@pytest.mark.parametrize("seed", range(5))
def test_utilities_are_divergences_of_the_joints_up_to_a_constant(seed: int) -> None:
    """``L_p = -KL(q ‖ p) - H(q) - E_q log p(z)`` and ``L_q = -KL(p ‖ q) - H(p) - E_p log data(x)``."""
    game = Game(10 * seed)
    with torch.no_grad():
        q, p = game.q, game.p
        rest = (q.sum(0) * game.pi_z.log()).sum()
        torch.testing.assert_close(game.decoder_utility(), -kl(q, p) - entropy(q) - rest, **exact)
        rest = (p.sum(1) * game.data.log()).sum()
        torch.testing.assert_close(game.encoder_utility(), -kl(p, q) - entropy(p) - rest, **exact)


@pytest.mark.parametrize("seed", range(5))
def test_each_player_climbs_down_its_own_divergence(seed: int) -> None:
    game = Game(10 * seed)
    of_decoder, of_encoder = game.gradients()
    (expected,) = torch.autograd.grad(-kl(game.q.detach(), game.p), game.decoder.logits)
    torch.testing.assert_close(of_decoder, expected, **exact)
    (expected,) = torch.autograd.grad(-kl(game.p.detach(), game.q), game.encoder.logits)
    torch.testing.assert_close(of_encoder, expected, **exact)
    assert (of_decoder - torch.autograd.grad(-kl(game.p, game.q), game.decoder.logits)[0]).norm() > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_learned_prior_is_part_of_the_decoders_utility(seed: int) -> None:
    game = Game(10 * seed, learned_prior=True)
    with torch.no_grad():
        expected = -kl(game.q, game.p) - entropy(game.q)
    torch.testing.assert_close(game.decoder_utility().detach(), expected, **exact)


@pytest.mark.parametrize("seed", range(5))
def test_equilibrium_is_one_joint_for_both(seed: int) -> None:
    """Nash where ``data(x) q(z | x) = p(z) p(x | z)``, whatever the joint; not Nash where they differ."""
    game = Game(10 * seed)
    assert all(gradient.norm() > 1e-2 for gradient in game.gradients())
    game.settle()
    torch.testing.assert_close(game.q, game.p, **exact)
    torch.testing.assert_close(game.q.sum(0), game.pi_z, **exact)
    torch.testing.assert_close(game.p.sum(1), game.data, **exact)
    for gradient in game.gradients():
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **exact)


def test_the_code_that_says_nothing_is_an_equilibrium_too() -> None:
    game = Game(0)
    with torch.no_grad():
        game.encoder.logits.copy_(game.pi_z.log().expand(K, L))
        game.decoder.logits.copy_(game.data.log().expand(L, K))
    for gradient in game.gradients():
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **exact)


@pytest.mark.parametrize("player", ["decoder", "encoder"])
def test_a_players_loss_estimates_its_utility(player: str) -> None:
    """The mean of 400 losses, each of 64 rows, within 5 standard errors; the other player's utility is further off."""
    game = Game(7)
    rows = OneHotCategorical(probs=game.data)
    torch.manual_seed(0)
    (loss_of,) = (p for p in game.model.players(lambda: rows.sample([64])) if p.name == player)
    with torch.no_grad():
        losses = torch.stack([next(loss_of.losses(STAGE))[0] for _ in range(400)])
        utility = {"decoder": game.decoder_utility(), "encoder": game.encoder_utility()}
    error = losses.std() / math.sqrt(len(losses))
    expected = -utility.pop(player)
    assert abs(losses.mean() - expected) < 5 * error
    (other,) = utility.values()
    assert abs(losses.mean() + other) > 15 * error


def test_training_finds_a_joint_with_the_right_marginals() -> None:
    """From draws alone; the total variation of 4 000 rows from their table is about .01."""
    game = Game(3)
    torch.manual_seed(1)
    x = OneHotCategorical(probs=game.data).sample([4000])
    before = 0.5 * (game.q - game.p).abs().sum()
    game.model.fit(x, epochs=15, lr=(3e-2, 1e-4), seed=0, progress=False)
    with torch.no_grad():
        assert 0.5 * (game.q - game.p).abs().sum() < 0.03 < before
        assert 0.5 * (game.q.sum(0) - game.pi_z).abs().sum() < 0.02


# Linear Gaussians: probabilistic principal components.


class LinearGaussian(nn.Module):
    """``N(y; A x + b, C Cᵀ)`` with a full covariance, or one variance for all."""

    def __init__(self, in_dim: int, out_dim: int, *, isotropic: bool):
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)
        nn.init.normal_(self.linear.weight, std=0.3)
        nn.init.zeros_(self.linear.bias)
        self.root = nn.Parameter(torch.zeros(()) if isotropic else torch.eye(out_dim))
        self.isotropic = isotropic

    def forward(self, given: Tensor) -> Distribution:
        loc = self.linear(given)
        if self.isotropic:
            return Independent(Normal(loc, self.root.exp(), validate_args=False), 1)
        lower = self.root.tril(-1) + self.root.diagonal().abs().diag()
        return MultivariateNormal(loc, scale_tril=lower, validate_args=False)

    @torch.no_grad()
    def set(self, weight: Tensor, cov: Tensor) -> None:
        self.linear.weight.copy_(weight)
        self.root.copy_(cov.log() / 2 if self.isotropic else torch.linalg.cholesky(cov))


SPECTRUM = torch.tensor([4.0, 2.5, 0.5, 0.5, 0.5]).double()


class PPCA:
    """The game of a linear decoder and encoder on Gaussian data, with exact best responses and utilities."""

    def __init__(self, latent_dim: int = 2):
        turn = torch.linalg.qr(random(5, 5, seed=1)).Q
        self.data = turn @ SPECTRUM.diag() @ turn.T  # covariance
        torch.manual_seed(0)
        self.encoder = LinearGaussian(5, latent_dim, isotropic=False).double()
        self.decoder = LinearGaussian(latent_dim, 5, isotropic=True).double()
        unit = torch.eye(latent_dim).double()
        prior = MultivariateNormal(unit[0] * 0, unit)
        self.model = SymmetricVAE(self.encoder, self.decoder, prior)
        self.eye = unit

    def decode_best(self) -> None:
        """Regression of ``x`` on ``z`` under ``q(x, z)``."""
        v, noise = self.encoder.linear.weight.detach(), self.encoder.root.detach().tril()
        cross = self.data @ v.T
        w = torch.linalg.solve(v @ cross + noise @ noise.T, cross, left=False)
        self.decoder.set(w, (self.data - w @ cross.T).trace() / len(self.data))

    def encode_best(self) -> None:
        """Bayes' rule, which is the regression of ``z`` on ``x`` under ``p(x, z)``."""
        w, noise = self.decoder.linear.weight.detach(), (2 * self.decoder.root.detach()).exp()
        inner = w.T @ w + noise * self.eye
        self.encoder.set(torch.linalg.solve(inner, w.T), noise * torch.linalg.inv(inner))

    @property
    def cov(self) -> Tensor:
        """Covariance of ``p(x)``."""
        w = self.decoder.linear.weight.detach()
        noise = (2 * self.decoder.root.detach()).exp()
        return w @ w.T + noise * torch.eye(len(w)).to(w)

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of each exact utility in its own parameters: the log densities are quadratic, so 2 n points are exact."""
        v, root = self.encoder.linear.weight.detach(), self.encoder.root.detach().tril()
        w, noise = self.decoder.linear.weight.detach(), self.decoder.root.detach().exp()
        x, e = _points(torch.linalg.cholesky(self.data), root)
        of_decoder = self.model.decoder_utility(x @ v.T + e, x).mean()
        z, e = _points(self.eye, noise * torch.eye(len(w)).to(w))
        of_encoder = self.model.encoder_utility(z, z @ w.T + e).mean()
        return (
            list(torch.autograd.grad(of_decoder, list(self.decoder.parameters()))),
            list(torch.autograd.grad(of_encoder, list(self.encoder.parameters()))),
        )


def _points(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[2 n, ·]`` whose mean is 0 and whose covariance is that of ``N(0, a aᵀ)`` beside ``N(0, b bᵀ)``."""
    both = torch.block_diag(a, b).T * math.sqrt(len(a) + len(b))
    points = torch.cat([both, -both])
    return points[:, : len(a)], points[:, len(a) :]


def test_best_responses_have_no_gradient_left() -> None:
    game = PPCA()
    game.decode_best()
    for gradient in game.gradients()[0]:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **exact)
    assert max(gradient.norm() for gradient in game.gradients()[1]) > 0.1
    game.encode_best()
    for gradient in game.gradients()[1]:
        torch.testing.assert_close(
            gradient.tril() if gradient.shape == (2, 2) else gradient, torch.zeros_like(gradient), **exact
        )


def test_best_responses_lead_to_principal_components() -> None:
    """Variances beyond the noise, ``w² = λ - σ²``, and the noise itself: Tipping and Bishop 1999, eq. 7 and 8."""
    game = PPCA()
    for _ in range(300):
        game.decode_best()
        game.encode_best()
    variances = torch.linalg.svdvals(game.decoder.linear.weight.detach()).square()
    torch.testing.assert_close(variances, torch.tensor([3.5, 2.0]).double(), rtol=0, atol=1e-3)
    assert abs((2 * game.decoder.root).exp().item() - 0.5) < 1e-3
    torch.testing.assert_close(game.cov, game.data, rtol=0, atol=1e-3)
    for gradient in [g for gradients in game.gradients() for g in gradients]:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


def test_from_no_code_at_all_only_loud_directions_grow() -> None:
    """A round of best responses multiplies a faint column by its eigenvalue over the mean of all eigenvalues."""
    game = PPCA(latent_dim=1)
    values, vectors = torch.linalg.eigh(game.data)
    for value, vector in zip(values, vectors.T, strict=True):
        game.decoder.set(1e-5 * vector[:, None], values.mean())
        game.encode_best()
        game.decode_best()
        grown = (vector @ game.decoder.linear.weight[:, 0]) / 1e-5
        torch.testing.assert_close(grown, value / values.mean(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_training_from_draws_finds_principal_components() -> None:
    """2 000 rows whose covariance is the spectrum's exactly.

    Over six seeds the deviations of the two ``w²`` and of the noise were .031, .027 and .0020, and none of the means
    was further than one of its standard errors from the truth; the gates are five deviations.
    """
    game = PPCA()
    game.model.float()
    rows = random(2000, 5, seed=2)
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * math.sqrt(2000)
    rows = rows @ torch.linalg.cholesky(game.data).T
    game.model.fit(rows.float(), epochs=200, batch_size=200, lr=(1e-2, 1e-4), seed=0, progress=False)
    variances = torch.linalg.svdvals(game.decoder.linear.weight.detach().double()).square()
    assert ((variances - torch.tensor([3.5, 2.0])).abs() < torch.tensor([0.155, 0.135])).all()
    assert abs((2 * game.decoder.root).exp().item() - 0.5) < 0.01


# Labelled pairs.


def losses(model: SymmetricVAE, x: Tensor, stage: Stage, seed: int = 0) -> dict[str, Tensor]:
    """Of every player, from draws of one seed; pairs as `SymmetricVAE.fit` leaves them during a fit."""
    found = {}
    for player in model.players(lambda: x):
        torch.manual_seed(seed)
        (loss,) = [loss for loss, _ in player.losses(stage)]
        assert loss is not None
        found[player.name] = loss
    return found


def seen_during_fit(model: SymmetricVAE, x: Tensor, **options: Any) -> dict[str, Any]:
    """What a callback sees in the first step of a fit: the losses of batches with these pairs."""
    seen: dict[str, Any] = {}
    stage = Schedule(num_steps=1, num_particles=options.get("num_particles", 1), tempering=None).at(0)
    before = losses(model, x, stage)

    def look(_: Any) -> None:
        seen.update(losses(model, x, stage))

    options |= {"epochs": 1, "batch_size": len(x), "lr": 1e-12, "progress": False, "seed": 0}
    model.fit(x, callbacks=[look], **options)
    return {"without": before, "with": seen}


@pytest.mark.parametrize("num_particles", [1, 3])
def test_every_pair_counts_as_one_row_of_the_batch(num_particles: int) -> None:
    game, (z, x) = Game(2), Game(2).pairs
    rows = x[:: len(x) // 8][:8]
    labelled = x[:6], z[:6]
    found = seen_during_fit(game.model, rows, pairs=labelled, num_particles=num_particles)
    with torch.no_grad():
        gained = {
            "decoder": game.model.decoder_utility(z[:6], x[:6]).sum(),
            "encoder": game.model.encoder_utility(z[:6], x[:6]).sum(),
        }
    for name, total in gained.items():
        expected = (8 * found["without"][name] - total) / 14
        torch.testing.assert_close(found["with"][name], expected, rtol=0, atol=1e-8)


def test_of_many_pairs_as_many_as_rows_are_taken() -> None:
    game, (z, x) = Game(2), Game(2).pairs
    scored: list[int] = []
    game.encoder.register_forward_hook(lambda module, given, q: scored.append(len(given[0])))
    game.model.fit(x[:4], pairs=(x, z), epochs=1, batch_size=4, progress=False, device="cpu")
    assert scored[-2:] == [4, 4]  # of the last turn: what the decoder drew, and pairs


def test_several_processes_share_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of two processes' losses is the loss of one with all rows, where the pairs divide evenly."""
    game, (z, x) = Game(2), Game(2).pairs
    monkeypatch.setattr(game.model, "_pairs", (z[:6], x[:6]))
    totals = []
    for rank in range(2):
        monkeypatch.setattr("implicitvi.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("implicitvi.distributed.count", lambda: 2)
        totals.append(losses(game.model, x[:8], STAGE)["encoder"])
    monkeypatch.undo()
    without = losses(game.model, x[:8], STAGE)["encoder"]
    with torch.no_grad():
        gained = game.model.encoder_utility(z[:6], x[:6]).sum()
    torch.testing.assert_close(sum(totals) / 2, (16 * without - gained) / 22, **exact)


bar_codes, bar_images, or_bars, _ = definitions(
    "15_symmetric_equilibrium.py", "bar_codes", "bar_images", "or_bars", "greatest"
)


def bars(seed: int = 0) -> SymmetricVAE:
    torch.manual_seed(seed)
    encoder = BinaryEncoder(nn.Sequential(nn.Flatten(), mlp([64, 128, 128, 8], nn.Tanh)))
    decoder = Decoder(mlp([8, 128, 128, 64], nn.Tanh), BernoulliLikelihood([1, 8, 8]))
    return SymmetricVAE(encoder, decoder, bar_codes)


X, Z = or_bars(24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ((X, Z[:20]), ShapeError, r"of shape \[24, 8\], got \[20, 8\] for 24 data"),
        ((X, Z[:, :7]), ShapeError, r"of shape \[24, 8\], got \[24, 7\] for 24 data"),
        ((X, Z.argmax(1)), ShapeError, r"\[24\] for 24 data"),
        ((X[:, 0], Z), ShapeError, "Data must be of shape"),
        ((X, 2 * Z - 1), OptionError, "possible for encoder and prior, got .* 24 of 24 rows"),
        ((X, Z.where(Z == 0, math.nan)), OptionError, "possible for encoder and prior"),
        ((X.where(X == 0, math.nan), Z), ModelError, "not finite"),
        ((255 * X, Z), OptionError, "Data of a Bernoulli likelihood must be between 0 and 1"),
        ((X, Z, Z), OptionError, r"pairs must be \(data"),
        (X, OptionError, r"pairs must be \(data"),
    ],
)
def test_pairs_that_do_not_match_are_refused_before_the_first_step(
    pairs: Any, error: type[Exception], message: str
) -> None:
    model = bars()
    with pytest.raises(error, match=message):
        model.fit(X, pairs=pairs, epochs=1, progress=False)
    assert model._pairs is None


def test_a_misspelt_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="epoch"):
        bars().fit(X, pairs=(X, Z), epoch=1)


def test_a_fit_with_pairs_stops_and_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    """More pairs than rows of a batch: those of every turn are another choice, and come from the fit's own stream."""
    rows, _ = or_bars(40, generator=torch.Generator().manual_seed(1))

    def stop(trainer: Trainer) -> None:
        if trainer.step_count == 12:
            raise StopTraining

    def fit(model: SymmetricVAE, folder: Path | None, pairs: Any = (X, Z), **more: Any) -> VAEFit:
        options: dict[str, Any] = {"epochs": 4, "batch_size": 8, "seed": 0, "progress": False}
        return model.fit(rows, pairs=pairs, checkpoint=folder, **options, device="cpu", **more)

    whole, stopped, other = bars(), bars(), bars(seed=1)
    fit(whole, None)
    fit(stopped, tmp_path, callbacks=[stop])
    assert fit(other, tmp_path).resumed == 2
    for mine, theirs in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    without = bars()
    fit(without, None, pairs=None)
    assert not torch.equal(next(without.parameters()), next(whole.parameters()))


def test_pairs_are_forgotten_after_the_fit() -> None:
    model = bars()
    model.fit(X, pairs=(X.numpy(), Z.numpy()), epochs=1, progress=False)
    assert model._pairs is None


# Needs of encoder, decoder and prior.


class Sampled(nn.Module):
    """An encoder or decoder that can only be drawn from."""

    def __init__(self, shape: list[int]):
        super().__init__()
        self.shape = shape

    def forward(self, given: Tensor) -> Distribution:
        return Implicit(lambda s: torch.zeros(*s, len(given), *self.shape), given.shape[:1], self.shape)


class LearnedDraws(nn.Module):
    """A prior with a parameter and no density."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(8))

    def forward(self) -> Distribution:
        return Implicit(lambda s: self.loc + torch.zeros(*s, 8), [], [8])


def test_networks_without_a_density_are_refused() -> None:
    model = bars()
    with pytest.raises(ModelError, match="encoder of .* must have a density"):
        SymmetricVAE(Sampled([8]), model.decoder, bar_codes)
    with pytest.raises(ModelError, match="decoder of .* must have a density"):
        SymmetricVAE(model.encoder, Sampled([1, 8, 8]), bar_codes)


def test_a_prior_without_a_density_may_be_drawn_from_but_not_learned() -> None:
    model, prior = bars(), LearnedDraws()
    with pytest.raises(ModelError, match="A prior with parameters must have a log_prob"):
        SymmetricVAE(model.encoder, model.decoder, prior)
    SymmetricVAE(model.encoder, model.decoder, prior.requires_grad_(False))


def test_validation_shows_both_utilities() -> None:
    fit = bars().fit(X, validation=X, epochs=2, progress=False)
    assert {name: len(values) for name, values in fit.validation.items()} == {
        "decoder_utility": 2,
        "encoder_utility": 2,
    }


# Binary codes.


def test_straight_through_bits_are_bits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000, requires_grad=True)
    draws = StraightThroughBernoulli(logits=logits).rsample([20])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    (gradient,) = torch.autograd.grad(draws.sum(), logits)
    probs = logits.detach().sigmoid()
    torch.testing.assert_close(gradient, 20 * probs * (1 - probs))


def test_a_binary_encoder_gives_the_elbo_gradients_where_asked() -> None:
    model = bars()
    prior = Independent(Bernoulli(torch.full([8], 0.4)), 1)
    with pytest.raises(ModelError, match="gradients through its draws"):
        VAE(model.encoder, model.decoder, prior)
    encoder = BinaryEncoder(model.encoder.network, straight_through=True)
    vae = VAE(encoder, model.decoder, prior)
    for gradient in torch.autograd.grad(vae.elbo(X).mean(), list(vae.parameters())):
        assert gradient.norm() > 0
    torch.manual_seed(0)
    q = encoder(X).mean
    kl = (q * (q / 0.4).log() + (1 - q) * ((1 - q) / 0.6).log()).sum(-1)
    closed = vae.decoder(encoder(X).rsample()).log_prob(X) - kl
    torch.manual_seed(0)
    torch.testing.assert_close(vae.elbo(X)[0], closed)


UPPER, LOWER = 2, 3


def bold(*sizes: int) -> nn.Module:
    """A network whose logits are far from 0."""
    network = mlp(sizes, nn.Tanh)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(3)
    return network


def net(*sizes: int) -> nn.Module:
    torch.manual_seed(sum(sizes))
    return bold(*sizes)


def ladder(straight_through: bool = False) -> tuple[nn.Module, ...]:
    """Encoder, decoder and prior of two levels on six binary pixels."""
    prior = LadderPrior(net(UPPER, 8, LOWER), UPPER)
    decoder = Decoder(nn.Sequential(LowerLevel(UPPER), net(LOWER, 8, 6)), BernoulliLikelihood([6]))
    encoder = LadderEncoder(net(6, 8, UPPER + LOWER), prior, straight_through=straight_through)
    return encoder, decoder, prior


def codes(bits: int) -> Tensor:
    """All of them, ``[2^bits, bits]``."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * bits).reshape(-1, bits)


PIXELS = torch.bernoulli(torch.full((7, 6), 0.5), generator=torch.Generator().manual_seed(3))


def two_levels(which: str) -> Distribution:
    """``p(z)``, or ``q(z | x)`` of one datum."""
    encoder, _, prior = ladder()
    q: Distribution = prior() if which == "prior" else encoder(PIXELS[:1])
    return q


@pytest.mark.parametrize("which", ["prior", "ladder"])
def test_codes_of_two_levels_are_drawn_as_they_are_scored(which: str) -> None:
    """Probabilities add to 1, and of 20 000 draws each of the 32 codes has its share within 5 standard errors."""
    q = two_levels(which)
    with torch.no_grad():
        probs = q.log_prob(codes(5)[:, None] if q.batch_shape else codes(5)).exp().flatten()
        assert abs(probs.sum() - 1) < 1e-5
        torch.manual_seed(0)
        draws = q.sample([20_000]).reshape(-1, 5)
    assert q.support.check(draws).all()
    assert not q.support.check(draws + 0.5).any()
    index = (draws @ 2.0 ** torch.arange(4, -1, -1)).long()
    share = torch.bincount(index, minlength=32) / 20_000
    assert ((share - probs).abs() < 5 * (probs * (1 - probs) / 20_000).sqrt() + 1e-4).all()
    assert (share - probs.flip(0)).abs().max() > 0.02


def test_the_ladder_adds_what_the_datum_says_to_the_logits_of_the_prior() -> None:
    encoder, _, prior = ladder()
    assert isinstance(encoder, LadderEncoder)
    with torch.no_grad():
        says = encoder.network(PIXELS)
        for z0 in codes(UPPER):
            logits = prior.network(z0) + says[:, UPPER:]
            base = torch.cat([z0, torch.zeros(LOWER)])
            for bit in range(LOWER):
                on = base.clone()
                on[UPPER + bit] = 1
                odds = encoder(PIXELS).log_prob(on) - encoder(PIXELS).log_prob(base)
                torch.testing.assert_close(odds, logits[:, bit], rtol=0, atol=1e-5)


def test_where_the_likelihood_is_linear_in_the_lower_bits_the_ladder_is_the_posterior() -> None:
    """``p(z1 | z0, x) ∝ p(z1 | z0) exp(a(x)·z1)``, by Bayes' rule on all codes."""
    encoder, _, prior = ladder()
    assert isinstance(encoder, LadderEncoder)
    with torch.no_grad():
        z1, slope = codes(LOWER), encoder.network(PIXELS)[:, UPPER:]
        for z0 in codes(UPPER):
            z = torch.cat([z0.expand(len(z1), -1), z1], 1)
            posterior = (prior().log_prob(z)[:, None] + z1 @ slope.T).softmax(0)
            q = encoder(PIXELS).log_prob(z[:, None]).softmax(0)
            torch.testing.assert_close(q, posterior, rtol=0, atol=1e-5)


def test_gradients_stay_home_on_the_ladder() -> None:
    encoder, decoder, prior = ladder()
    model = SymmetricVAE(encoder, decoder, prior)
    own = {"encoder": list(encoder.parameters()), "decoder": [*decoder.parameters(), *prior.parameters()]}
    players = {player.name: player.parameters() for player in model.players(lambda: PIXELS)}
    for name, loss in losses(model, PIXELS, STAGE).items():
        assert {id(p) for p in players[name]} == {id(p) for p in own[name]}
        for gradient in torch.autograd.grad(loss, own[name], retain_graph=True):
            assert gradient.isfinite().all() and gradient.norm() > 0
        (others,) = (parameters for other, parameters in own.items() if other != name)
        assert torch.autograd.grad(loss, others, allow_unused=True) == (None,) * len(others)


def test_one_objective_for_all_gives_all_of_the_ladder_gradients() -> None:
    """With straight-through bits the ladder is part of the ELBO, the prior's share in the encoder included."""
    encoder, decoder, prior = ladder(straight_through=True)
    vae = VAE(encoder, decoder, prior)
    for gradient in torch.autograd.grad(vae.elbo(PIXELS).mean(), list(vae.parameters())):
        assert gradient.norm() > 0
    log_q = encoder(PIXELS).log_prob(torch.ones(5)).sum()
    shared = torch.autograd.grad(log_q, list(prior.parameters()), allow_unused=True)
    assert all(g is not None for g in shared)
    with pytest.raises(ModelError, match="gradients through its draws"):
        VAE(ladder()[0], decoder, prior)


def test_a_ladder_with_too_few_logits_is_refused() -> None:
    _, decoder, prior = ladder()
    with pytest.raises(ShapeError, match="must be 5, 2 for the upper level and 3 for the lower, got 4"):
        SymmetricVAE(LadderEncoder(net(6, 4), prior), decoder, prior)


def test_a_ladder_learns_the_distribution_of_four_patterns() -> None:
    """Total variation, summed over all codes and all 64 images: of ``p(x)`` from the data, and of the two joints.

    Over ten fits from five starts the greatest were .014 and .028.
    """
    upper, lower = 2, 4
    torch.manual_seed(0)
    prior = LadderPrior(bold(upper, 16, lower), upper)
    network = nn.Sequential(LowerLevel(upper), bold(lower, 16, 6))
    decoder = Decoder(network, BernoulliLikelihood([6]))
    encoder = LadderEncoder(bold(6, 16, upper + lower), prior)
    model = SymmetricVAE(encoder, decoder, prior)
    patterns = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0]]).float()
    data = torch.zeros(64)
    data[(patterns @ 2.0 ** torch.arange(5, -1, -1)).long()] = 0.25

    @torch.no_grad()
    def distances() -> tuple[Tensor, Tensor]:
        z, x = codes(upper + lower), codes(6)
        p = (decoder(z[:, None]).log_prob(x) + prior().log_prob(z)[:, None]).exp()
        q = encoder(x).log_prob(z[:, None]).exp() * data
        return 0.5 * (p.sum(0) - data).abs().sum(), 0.5 * (p - q).abs().sum()

    assert min(distances()) > 0.9
    rows = patterns.repeat(32, 1)
    model.fit(rows, epochs=800, lr=(3e-2, 1e-3), seed=0, progress=False)
    assert max(distances()) < 0.05


# Bars.


def test_codes_of_bars_are_the_24_that_occur_equally_often() -> None:
    draws = bar_codes(24_000, generator=torch.Generator().manual_seed(0))
    kinds, counts = draws.unique(dim=0, return_counts=True)
    assert (kinds[:, :4].sum(1) == 2).all() and (kinds[:, 4:].sum(1) == 1).all()
    assert len(kinds) == 24
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000 * 23 / 24)


def test_images_of_bars_are_their_union() -> None:
    for code, image in zip(codes(8), bar_images(codes(8)), strict=True):
        for i in range(8):
            for j in range(8):
                assert image[0, i, j] == max(code[i // 2], code[4 + j // 2])


def test_pixels_of_bars_flip() -> None:
    x, z = or_bars(5000, generator=torch.Generator().manual_seed(0))
    again = or_bars(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, again[0]) and torch.equal(z, again[1])
    share = (x != bar_images(z)).float().mean()
    assert abs(share - 0.15) < 5 * math.sqrt(0.15 * 0.85 / x.numel())
    assert torch.equal(or_bars(9, flip=0)[0].unique(), torch.tensor([0.0, 1.0]))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_24_labelled_images_are_enough_to_read_bars(seed: int) -> None:
    """Whole codes of images never seen, and the distribution of codes summed over all 256."""
    generator = torch.Generator().manual_seed(seed)
    train, (x, z), held_out = (or_bars(n, generator=generator) for n in (5000, 24, 5000))
    model = bars(seed)
    model.fit(train[0], pairs=(x, z), epochs=52, lr=1e-3, seed=seed, progress=False)  # 2 028 steps
    with torch.no_grad():
        q = model.encoder(held_out[0])
        exact_codes = ((q.mean > 0.5) == held_out[1].bool()).all(1).float().mean()
        marginal = q.log_prob(codes(8)[:, None]).exp().mean(1)
    occurs = (codes(8)[:, :4].sum(1) == 2) & (codes(8)[:, 4:].sum(1) == 1)
    assert exact_codes >= 0.93
    assert 0.5 * (marginal - occurs / 24).abs().sum() <= 0.10
