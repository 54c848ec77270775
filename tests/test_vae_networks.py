"""Ready-made networks: shapes, gradients, noise that is used, flows that know their density, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal

from implicitvi.avb.adversaries import InjectedAdversary, JointAdversary, PairwiseAdversary
from implicitvi.avb.samplers import NoiseBasisSampler
from implicitvi.datasets import image_folder
from implicitvi.errors import DataError, ImplicitVIError, ModelError, OptionError, ShapeError
from implicitvi.nn import Ensemble, Injected, SkipNet, mlp
from implicitvi.vae import AVB, VAE
from implicitvi.vae.architectures import POSTERIORS, Architecture, Convolutional, Dense, face_networks, mnist_networks
from implicitvi.vae.decoders import LIKELIHOODS, GaussianLikelihood, PixelLikelihood
from implicitvi.vae.encoders import InjectedEncoder
from implicitvi.vae.flows import InverseAutoregressiveFlow, PlanarFlow, PlanarTransform

D = 3
ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "dense": lambda: Dense((1, 6, 5), hidden=(12, 10)),
    "dense joint": lambda: Dense((1, 6, 5), hidden=(12, 10), pairing="joint"),
    "convolutional": lambda: Convolutional((2, 7, 9), channels=(4, 6), blocks=1),
    "other strides": lambda: Convolutional((1, 8, 8), channels=(3, 4, 5), strides=(1, 3, 2), kernel=5),
    "mnist": lambda: mnist_networks(1),
    "faces": lambda: face_networks(1, size=16),
}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
FLOWS = {
    "iaf": lambda: InverseAutoregressiveFlow(D, 5, transforms=3, hidden=(16,)),
    "planar": lambda: PlanarFlow(D, 5, transforms=3),
}
each_flow = pytest.mark.parametrize("name", FLOWS)


def data(nets: Architecture, rows: int = 4) -> Tensor:
    return torch.rand(rows, *nets.x_shape)


def shaken(module: nn.Module, size: float = 0.1) -> nn.Module:
    """The module with noise on all its parameters, so that no layer is zero any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def without_gradient(module: nn.Module, loss: Tensor) -> list[str]:
    """Parameters that a loss gives no finite gradient other than zero."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    good = [g is not None and g.isfinite().all() and g.any() for g in gradients]
    return [name for name, fine in zip(names, good, strict=True) if not fine]


# Shapes and gradients


@each_architecture
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_encoder_fits_and_all_of_it_learns(name: str, posterior: str) -> None:
    nets = ARCHITECTURES[name]()
    encoder = shaken(nets.encoder(D, posterior))
    q = encoder(data(nets))
    assert q.batch_shape == (4,) and q.event_shape == (D,)
    assert q.sample(torch.Size([5])).shape == (5, 4, D)
    if posterior == "binary":
        loss = q.log_prob(q.sample()).sum()
    elif hasattr(q, "rsample_and_log_prob"):
        z, log_q = q.rsample_and_log_prob(torch.Size([8]))
        loss = z.square().sum() + log_q.sum()
    else:
        loss = q.rsample(torch.Size([8])).square().sum()
    assert without_gradient(encoder, loss) == []


@each_architecture
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_decoder_fits_and_all_of_it_learns(name: str, likelihood: str) -> None:
    nets = ARCHITECTURES[name]()
    decoder = shaken(nets.decoder(D, likelihood))
    x = decoder(torch.randn(4, D)).sample()
    assert x.shape == (4, *nets.x_shape)
    p = decoder(torch.randn(5, 4, D))
    assert p.batch_shape == (5, 4) and p.event_shape == nets.x_shape
    assert without_gradient(decoder, p.log_prob(x).sum()) == []


@each_architecture
@pytest.mark.parametrize("square", [False, True])
def test_every_adversary_fits_starts_as_said_and_all_of_it_learns(name: str, square: bool) -> None:
    nets = ARCHITECTURES[name]()
    adversary = nets.adversary(D, square=square)
    z, x = torch.randn(5, 4, D), data(nets)
    expected = 0.5 * (z.square().sum(-1) - D) if square else torch.zeros(5, 4)
    torch.testing.assert_close(adversary(z, x), expected)
    shaken(adversary)
    scores = adversary(z, x)
    assert without_gradient(adversary, scores.square().sum()) == []
    alone = [adversary(z[s, [b]], x[[b]]) for s in range(5) for b in range(4)]
    torch.testing.assert_close(scores, torch.cat(alone).view(5, 4), atol=1e-5, rtol=1e-4)


def test_scores_depend_on_code_and_datum_together() -> None:
    """A sum of a score of ``x`` and one of ``z`` alone could not tell whose code a code is."""
    for name in ARCHITECTURES:
        nets = ARCHITECTURES[name]()
        adversary = shaken(nets.adversary(D), 0.5).double()
        z, x = torch.randn(2, 1, D).double(), data(nets, 2).double()
        table = torch.cat([adversary(z, x[[b]]) for b in range(2)], 1)
        interaction = table[0, 0] - table[0, 1] - table[1, 0] + table[1, 1]
        assert interaction.abs() > 1e-9, name


# Decoders


@pytest.mark.parametrize("name", ["convolutional", "other strides", "faces"])
def test_a_convolutional_decoder_takes_codes_one_by_one_or_all_at_once(name: str) -> None:
    nets = ARCHITECTURES[name]()
    decoder = shaken(nets.decoder(D, "gaussian")).double()
    z = torch.randn(2, 3, D, dtype=torch.float64)
    together = decoder(z).mean
    alone = torch.stack([torch.stack([decoder(z[i, j]).mean for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
    assert (together[0, 0] - together[0, 1]).abs().max() > 1e-6


@pytest.mark.parametrize("side", range(5, 12))
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_decoder_gives_back_the_size_that_the_encoder_has_rounded(side: int, stride: int, kernel: int) -> None:
    shape = (1, side, 8)
    nets = Convolutional(shape, channels=(2, 2), strides=(stride, 2), kernel=kernel)
    assert nets.decoder(2)(torch.zeros(2)).event_shape == shape


def test_a_decoder_looks_at_neighbours_only() -> None:
    """The mirror image of convolutions: one entry of the small image moves a patch of the large one."""
    nets = Convolutional((1, 16, 16), channels=(2, 2))
    upward = nets.outputs(2, 256)
    h = torch.zeros(1, 2, 4, 4)
    before = upward.network(h)
    h[0, 0, 0, 0] = 1
    moved = (upward.network(h) - before).abs() > 0
    assert moved[..., :7, :7].any() and not moved[..., 7:, :].any() and not moved[..., 7:].any()


def test_the_scale_of_an_output_goes_with_its_own_pixel() -> None:
    nets = Convolutional((2, 4, 4), channels=(3,))
    likelihood = GaussianLikelihood(nets.x_shape, scale="output")
    decoder = shaken(nets.decoder(D, likelihood))
    z = torch.randn(5, D)
    p = decoder(z)
    images = decoder.network(z).unflatten(-1, (4, 4, 4))  # channels of means, then of log scales
    assert torch.equal(p.mean, images[:, :2])
    torch.testing.assert_close(p.stddev.log(), images[:, 2:])


def test_pixels_have_means_inside_the_unit_interval_and_a_scale_each() -> None:
    nets = ARCHITECTURES["faces"]()
    decoder = nets.decoder(D, "pixels")
    assert isinstance(decoder.likelihood, PixelLikelihood)
    p = decoder(30 * torch.randn(4, D))
    assert p.mean.min() >= 0 and p.mean.max() <= 1
    assert decoder.likelihood.log_scale.shape == nets.x_shape
    torch.testing.assert_close(p.stddev, torch.full_like(p.stddev, 0.25))
    logits = decoder.network(torch.ones(D))
    x = torch.rand(nets.x_shape)
    by_hand = Normal(logits.sigmoid().view(nets.x_shape), 0.25).log_prob(x).sum()
    torch.testing.assert_close(decoder(torch.ones(D)).log_prob(x), by_hand)
    with pytest.raises(OptionError, match="likelihood of pixels must be between 0 and 1, got values from 0 to 2"):
        decoder.check(torch.tensor([0.0, 2.0]))


# Noise


@each_architecture
@pytest.mark.parametrize("posterior", ["implicit", "injected", "noise_basis"])
def test_draws_of_the_same_datum_differ_and_have_one_law(name: str, posterior: str) -> None:
    """Gate: 5 standard errors of 6 moments; the data are two copies of one, so their draws have one law."""
    nets = ARCHITECTURES[name]()
    encoder = shaken(nets.encoder(D, posterior))
    x = data(nets, 1).expand(2, *nets.x_shape)
    with torch.no_grad():
        z = encoder(x).sample(torch.Size([4000]))
    assert (z[0] - z[1]).abs().min() > 0 and (z[:, 0] - z[:, 1]).abs().max() > 0
    for draws in (z.split(2000), z.unbind(1)):  # early and late draws; first and second row
        one, other = (part.reshape(-1, D).double() for part in draws)
        powers = [torch.cat([each, each.square()], -1) for each in (one, other)]
        off = powers[0].mean(0) - powers[1].mean(0)
        error = sum(each.var(0) / len(each) for each in powers).sqrt()
        assert (off / error).abs().max() < 5
        planted = powers[0].mean(0) - (1.2 * powers[1] + 0.2).mean(0)
        assert (planted / error).abs().max() > 5


def test_injected_noise_goes_through_every_projection() -> None:
    """With all projections but one silenced the draws still differ; with all of them silenced they do not."""
    nets = ARCHITECTURES["convolutional"]()
    x = data(nets)
    count = len(nets.layers())
    for kept in [*range(count), None]:
        encoder = nets.encoder(D, "injected")
        assert isinstance(encoder, InjectedEncoder)
        with torch.no_grad():
            for i, projection in enumerate(encoder.network.projections):
                if i != kept:
                    projection.weight.zero_()
            z = encoder(x).sample(torch.Size([2]))
        assert bool((z[0] != z[1]).any()) == (kept is not None)


def test_an_injected_network_is_the_loop_over_its_layers() -> None:
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3, stride=2, padding=1)]
    net = Injected(layers, 4, D, x_shape=(1, 5, 5)).double()
    x, vector = torch.rand(2, 1, 5, 5).double(), torch.randn(3, 2, 4).double()
    for s in range(3):
        for b in range(2):
            h = x[b][None]
            for layer, projection in zip(net.layers, net.projections, strict=True):
                seen = layer(h)
                h = nn.functional.elu(seen + projection(vector[s, b]).reshape(seen.shape))
            torch.testing.assert_close(net(vector, x)[s, b], net.head(h.flatten()))


def test_a_batched_basis_is_the_loop_over_its_networks() -> None:
    nets = [shaken(SkipNet(2, D, mlp([2, 7, 5, D]))) for _ in range(4)]
    ensemble = Ensemble(nets).double()
    eps = torch.randn(6, 5, 4, 2, dtype=torch.float64)
    looped = torch.stack([net.double()(eps[..., m, :]) for m, net in enumerate(nets)], -2)
    torch.testing.assert_close(ensemble(eps), looped, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ensemble(eps[0, 0]), looped[0, 0], atol=1e-12, rtol=1e-12)


def test_moments_of_a_noise_basis_are_those_of_its_draws(seed: int) -> None:
    """Gate: 5 standard errors of each mean and covariance, from 40 000 draws on either side."""
    sampler = NoiseBasisSampler(2, context_dim=4, num_basis=3, hidden=(8,), mixing=())
    assert isinstance(sampler.mix, nn.Sequential) and len(sampler.mix) == 1
    shaken(sampler, 0.3).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    count = 40_000
    with torch.no_grad():
        mean, cov = sampler.moments(count, x)
        z = sampler(count, x)
    centred = z - z.mean(0)
    products = centred[..., :, None] * centred[..., None, :]
    assert ((z.mean(0) - mean) / (2 * z.var(0) / count).sqrt()).abs().max() < 5
    error = (2 * products.var(0) / count).sqrt()
    assert ((products.mean(0) - cov) / error).abs().max() < 5
    assert ((products.mean(0) - 1.1 * cov) / error).abs().max() > 5


# Flows


@each_flow
def test_a_flow_knows_the_density_of_its_draws_and_of_any_code(name: str) -> None:
    """By hand: the base's density at the code before the maps, less the log determinant that autograd gives."""
    flow = shaken(FLOWS[name](), 0.4).double()
    h = torch.randn(2, 5, dtype=torch.float64)
    q = flow(h)
    torch.manual_seed(3)
    z, log_q = q.rsample_and_log_prob(torch.Size([4]))
    torch.manual_seed(3)
    start = q.base_dist.rsample(torch.Size([4]))

    def through(code: Tensor, row: int) -> Tensor:
        for step in flow(h[[row]]).maps:
            code = step(code[None])[0]
        return code

    for s in range(4):
        for b in range(2):
            at = start[s, b]
            torch.testing.assert_close(through(at, b), z[s, b])
            jacobian = torch.autograd.functional.jacobian(lambda code, b=b: through(code, b), at)
            by_hand = q.base_dist.log_prob(at[None])[b] - jacobian.slogdet().logabsdet
            torch.testing.assert_close(log_q[s, b], by_hand)
    torch.testing.assert_close(q.log_prob(z.detach()), log_q, atol=1e-7, rtol=1e-7)


@each_flow
def test_a_flow_integrates_to_one(name: str) -> None:
    """The mean of the density ratio to a wider Gaussian, over draws of that; 5 standard errors."""
    flow = shaken(FLOWS[name](), 0.3).double()
    with torch.no_grad():
        q = flow(torch.randn(1, 5, dtype=torch.float64))
        loc, scale = q.sample(torch.Size([4000])).mean(0), q.sample(torch.Size([4000])).std(0)
        wide = Normal(loc, 2 * scale)
        z = wide.sample(torch.Size([20_000]))
        ratio = (q.log_prob(z) - wide.log_prob(z).sum(-1)).exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.05
    assert (ratio.mean() - 1).abs() < 5 * error
    assert (1.5 * ratio.mean() - 1).abs() > 5 * error


def test_draws_of_an_inverse_autoregressive_flow_take_one_pass() -> None:
    flow = InverseAutoregressiveFlow(8, 5, transforms=2, hidden=(16,))
    passes = []
    for each in flow.maps:
        each.hyper.register_forward_hook(lambda *_: passes.append(1))
    q = flow(torch.randn(2, 5))
    q.rsample_and_log_prob(torch.Size([3]))
    assert len(passes) == 2
    q.log_prob(torch.zeros(2, 8))
    assert len(passes) > 2 + 2 * 8


def test_gradients_through_the_inverse_of_a_planar_map_are_those_of_differences() -> None:
    u, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, D), (2, D), (2,)))
    y = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda u, w, b, y: PlanarTransform(u, w, b).inv(y), (u, w, b, y))


def test_a_vae_with_a_flow_takes_the_density_that_comes_with_the_draws() -> None:
    """The bound by hand, from the same draws, with the density asked for afterwards."""
    model = VAE.dense(6, D, hidden=(8,), posterior="iaf")
    shaken(model)
    x = torch.rand(4, 6).round()
    torch.manual_seed(2)
    elbo = model.elbo(x, 5)
    torch.manual_seed(2)
    q = model.encoder(x)
    z = q.rsample(torch.Size([5]))
    torch.testing.assert_close(elbo, model.log_joint(z, x) - q.log_prob(z), atol=1e-4, rtol=1e-4)


# Models


SYSTEMS: dict[str, Callable[[], VAE | AVB]] = {
    "VAE.dense": lambda: VAE.dense(9, 2, hidden=(8,)),
    "VAE.dense iaf": lambda: VAE.dense((1, 3, 3), 2, hidden=(8,), posterior="iaf"),
    "VAE.dense planar": lambda: VAE.dense(9, 2, hidden=(8,), posterior="planar"),
    "VAE.convolutional": lambda: VAE.convolutional((1, 8, 8), 2, channels=(2, 3)),
    "VAE.mnist": lambda: VAE.mnist(2, width=1),
    "VAE.faces": lambda: VAE.faces(2, width=1, size=16),
    "AVB.dense": lambda: AVB.dense(9, 2, hidden=(8,)),
    "AVB.dense prior": lambda: AVB.dense((3, 3), 2, hidden=(8,), contrast="prior"),
    "AVB.convolutional": lambda: AVB.convolutional((1, 8, 8), 2, channels=(2, 3)),
    "AVB.convolutional prior": lambda: AVB.convolutional((1, 8, 8), 2, contrast="prior"),
    "AVB.mnist": lambda: AVB.mnist(2, width=1),
    "AVB.mnist prior": lambda: AVB.mnist(2, width=1, contrast="prior"),
    "AVB.faces": lambda: AVB.faces(2, width=1, size=16),
    "AVB.faces gaussian": lambda: AVB.faces(2, width=1, size=16, contrast="gaussian"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_constructor_gives_a_model_that_trains(name: str) -> None:
    model = SYSTEMS[name]()
    x = torch.rand(12, *model.x_shape).round()
    before = [p.detach().clone() for p in model.parameters()]
    fit = model.fit(x, epochs=1, batch_size=4, seed=1, progress=False, device="cpu")
    assert fit.stop_reason == "finished" and fit.skipped == 0
    after = list(model.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) / len(moved) > 0.9
    assert model.reconstruct(x).shape == x.shape and model.sample(3).shape == (3, *model.x_shape)
    assert model.log_joint(model.encode(x, 2), x).shape == (2, 12)


@pytest.mark.parametrize("name", SYSTEMS)
def test_codes_have_all_their_bits_in_mixed_precision(name: str) -> None:
    model = SYSTEMS[name]()
    x = torch.rand(8, *model.x_shape).round()
    fit = model.fit(x, epochs=1, batch_size=4, seed=1, progress=False, device="cpu", precision="bfloat16")
    assert fit.stop_reason == "finished" and fit.skipped == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = model.encoder(x)
        assert q.rsample().dtype == torch.float32
        together = getattr(q, "rsample_and_log_prob", None)
        assert together is None or all(part.dtype == torch.float32 for part in together())


def test_the_papers_networks_have_the_papers_sizes() -> None:
    nets = mnist_networks()
    convolutions = [m for m in nets.features() if isinstance(m, nn.Sequential)]
    shapes = [tuple(layer[-1].weight.shape) for layer in convolutions]
    assert shapes == [(64, 1, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (512, 256, 5, 5)]
    upward = nets.outputs(32, 784)
    assert upward.shape == (512, 7, 7)
    weights = [tuple(m.weight.shape) for m in upward.network if isinstance(m, nn.ConvTranspose2d)]
    assert weights == [(512, 256, 5, 5), (256, 128, 5, 5), (128, 64, 5, 5), (64, 1, 5, 5)]
    adversary = nets.adversary(32, square=True)
    assert isinstance(adversary, PairwiseAdversary) and adversary.square
    assert [m.weight.shape[0] for m in adversary.z_net if isinstance(m, nn.Linear)] == [1024, 1024, 1024, 8193]
    sampler = nets.encoder(32, "noise_basis").sampler
    assert isinstance(sampler, NoiseBasisSampler)
    assert (sampler.num_basis, sampler.noise_dim, sampler.context_dim) == (32, 32 * 64, 25088)
    assert [w.shape[-1] for w in sampler.basis.weights] == [128, 128, 128, 32]
    faces = face_networks()
    assert isinstance(faces.adversary(64), InjectedAdversary)
    assert faces.outputs(64, 3 * 64 * 64).shape == (512, 4, 4)
    assert isinstance(Dense(9, pairing="joint").adversary(2), JointAdversary)


def test_a_folder_of_pictures_is_fitted_as_it_is_and_a_broken_one_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    model = VAE.faces(2, width=1, size=16)
    options = {"epochs": 2, "batch_size": 3, "seed": 1, "progress": False, "device": "cpu"}
    fit = model.fit(image_folder(tmp_path, 16), **options)
    assert fit.stop_reason == "finished" and len(fit.history["model"]) == 4
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.png cannot be read"):
        model.fit(image_folder(tmp_path, 16), **options)


# What is refused


REFUSED: dict[str, tuple[Callable[[], object], type[ImplicitVIError], str]] = {
    "likelihood": (lambda: VAE.dense(4, 2, likelihood="bernouli"), OptionError, "'bernoulli'"),
    "posterior": (lambda: VAE.dense(4, 2, posterior="gausian"), OptionError, "'gaussian'"),
    "no density": (lambda: VAE.dense(4, 2, posterior="implicit"), ModelError, "density"),
    "no gradients": (lambda: AVB.dense(4, 2, posterior="binary"), ModelError, "gradients"),
    "contrast": (lambda: AVB.dense(4, 2, contrast="gausian"), OptionError, "'gaussian'"),
    "z_dim": (lambda: VAE.dense(4, 0), OptionError, "z_dim must be .*, got 0"),
    "x_dim": (lambda: VAE.dense(0, 2), OptionError, "x_shape must be .*, got 0"),
    "no hidden": (lambda: VAE.dense(4, 2, hidden=()), OptionError, "hidden must be at least one width"),
    "hidden": (lambda: VAE.dense(4, 2, hidden=(8, 0)), OptionError, "hidden must be"),
    "noise, implicit": (
        lambda: AVB.dense(4, 3, contrast="prior", noise_dim=2),
        OptionError,
        "noise_dim must be at least the latent dimension 3, got 2",
    ),
    "noise, injected": (
        lambda: AVB.convolutional((1, 8, 8), 3, contrast="prior", noise_dim=2),
        OptionError,
        "noise_dim must be .* >= 3, got 2",
    ),
    "noise, unused": (
        lambda: Dense(4).encoder(2, "iaf", noise_dim=4),
        OptionError,
        "posterior with noise_dim must be .*, got 'iaf'",
    ),
    "basis, unused": (
        lambda: Dense(4).encoder(2, "implicit", num_basis=4),
        OptionError,
        "posterior with num_basis must be .*, got 'implicit'",
    ),
    "basis": (lambda: AVB.dense(4, 2, num_basis=0), OptionError, "num_basis must be"),
    "pairing": (lambda: Dense(4, pairing="prodct"), OptionError, "'product'"),
    "rows": (lambda: VAE.convolutional((784,), 2), ShapeError, r"must be \(channels, height, width\), got \(784,\)"),
    "grey": (lambda: VAE.convolutional((28, 28), 2), ShapeError, "Grey images have one channel"),
    "strides": (
        lambda: Convolutional((1, 8, 8), strides=(2,)),
        OptionError,
        "channels and strides must be equally many, .*got 2 and 1",
    ),
    "channels": (lambda: Convolutional((1, 8, 8), channels=(4, 0)), OptionError, "channels must be"),
    "kernel": (lambda: Convolutional((1, 8, 8), kernel=4), OptionError, "kernel size must be odd, got 4"),
    "critic": (
        lambda: Convolutional((1, 8, 8), critic=Dense(64)),
        ShapeError,
        r"x_shape of the critic must be \(1, 8, 8\), got \(64,\)",
    ),
    "likelihood's shape": (
        lambda: VAE.dense(4, 2, likelihood=GaussianLikelihood([5])),
        ShapeError,
        r"x_shape of the likelihood must be \(4,\), got \(5,\)",
    ),
    "codes": (
        lambda: VAE.dense(4, 2).decode(torch.randn(3, 5)),
        ShapeError,
        r"Codes must be of shape \[\.\.\., 2\], got \[3, 5\]",
    ),
    "width": (lambda: VAE.mnist(2, width=0), OptionError, "width must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_by_name(what: str) -> None:
    make, error, complaint = REFUSED[what]
    with pytest.raises(error, match=complaint):
        make()


def test_a_misspelt_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="likelyhood"):
        VAE.dense(4, 2, likelyhood="gaussian")
    with pytest.raises(TypeError, match="hiden"):
        AVB.mnist(2, width=1, hiden=(3,))


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (torch.zeros(8, 3, 8, 8), r"of shape \[N, 1, 8, 8\], got \[8, 3, 8, 8\]"),
        (torch.zeros(8, 64), "their channel axis"),
        (torch.full((8, 1, 8, 8), torch.nan), "finite, got 8 of 8 rows"),
        (torch.full((8, 1, 8, 8), 255.0), "Divide pixels by 255"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_the_first_step(x: Tensor, complaint: str) -> None:
    model = VAE.convolutional((1, 8, 8), 2, channels=(2,))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ImplicitVIError, match=complaint):
        model.fit(x, epochs=1, progress=False, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
