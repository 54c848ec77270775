"""Training of latent variable models: data of every kind, exact numbers, options, and what is refused."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from itertools import product
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from implicitvi import StopTraining
from implicitvi.avb.adversaries import PairwiseAdversary
from implicitvi.avb.samplers import NoiseBasisSampler
from implicitvi.errors import ImplicitVIError, ModelError, NonFiniteError, OptionError, ShapeError
from implicitvi.nn import mlp
from implicitvi.training import Trainer
from implicitvi.vae import AVB, VAE
from implicitvi.vae.data import batches_of
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder, likelihood_of
from implicitvi.vae.distributions import Implicit
from implicitvi.vae.encoders import GaussianEncoder, ImplicitEncoder
from implicitvi.vae.fitting import VAEFit
from implicitvi.vae.model import LatentModel
from implicitvi.vae.settings import FitOptions, FitSettings

X, Z, H = 6, 2, 8


def decoder(x_dim: int = X, z_dim: int = Z) -> Decoder:
    return Decoder(mlp([z_dim, H, x_dim]), BernoulliLikelihood([x_dim]))


def vae(seed: int = 0, hidden: int = H) -> VAE:
    torch.manual_seed(seed)
    return VAE(GaussianEncoder(mlp([X, hidden, 2 * Z])), decoder(), Z)


def avb(seed: int = 0, **options: Any) -> AVB:
    torch.manual_seed(seed)
    sampler = NoiseBasisSampler(Z, context_dim=H, num_basis=3, hidden=(H,))
    encoder = ImplicitEncoder(sampler, mlp([X, H, H]))
    adversary = PairwiseAdversary(mlp([X, H, H + 1]), mlp([Z, H, H + 1]))
    return AVB(encoder, decoder(), Z, adversary, **options)


OBJECTIVES: dict[str, Callable[[], LatentModel]] = {
    "VAE": vae,
    "AVB": avb,
    "AVB, Gaussian contrast": partial(avb, contrast="gaussian"),
    "AVB, averaged adversary": partial(avb, averaging=0.5),
}


def data(rows: int = 20, dim: int = X) -> Tensor:
    return torch.rand(rows, dim, generator=torch.Generator().manual_seed(1)).round()


def fit(model: LatentModel, train: Any = None, **options: Any) -> VAEFit:
    options = {"epochs": 3, "batch_size": 8, "seed": 0, "progress": False, "device": "cpu"} | options
    return model.fit(data() if train is None else train, **options)


def weights(model: LatentModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: LatentModel, b: LatentModel) -> bool:
    return same_weights(weights(a), weights(b))


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit; what is not known yet is NaN."""
    return list(a) == list(b) and all(a[n].nan_to_num().equal(b[n].nan_to_num()) for n in a)


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(data(), torch.arange(20)), batch_size=8, shuffle=True, **options)


class Rows(Dataset[Any]):
    """Rows with labels, of which some are augmented by torch's generator."""

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index] * torch.rand(()), index


KINDS: dict[str, Callable[[], Any]] = {
    "tensor": data,
    "float64 array": lambda: data().double().numpy(),
    "bytes": lambda: data().byte(),
    "booleans": lambda: data().bool(),
    "TensorDataset": lambda: TensorDataset(data(), torch.arange(20)),
    "Dataset": lambda: Rows(data()),
    "DataLoader": shuffled,
    "DataLoader, generator": lambda: shuffled(generator=torch.Generator().manual_seed(3)),
    "list of batches": lambda: list(data().split(8)),
}


# data


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_every_kind_are_trained_on_and_validated(kind: str) -> None:
    before = weights(model := vae())
    done = fit(model, KINDS[kind](), validation=KINDS[kind]())
    assert done.stop_reason == "finished" and done.epochs == 3 and done.skipped == 0
    assert len(done.history["model"]) == 3 * (3 if "Load" in kind or "list" in kind else 2)
    assert all(not torch.equal(before[name], w) for name, w in weights(model).items())
    assert len(done.validation["elbo"]) == 3 and not model.training


@pytest.mark.parametrize("rows", [20, 16, 5])
def test_an_epoch_shows_each_row_at_most_once_and_only_full_batches(rows: int) -> None:
    batches = batches_of(torch.arange(rows)[:, None], 8, torch.empty(0))
    epochs = [torch.cat(list(batches.epoch(seed))).flatten().tolist() for seed in (1, 2, 1)]
    assert batches.steps == max(rows // 8, 1)
    for seen in epochs:
        assert len(set(seen)) == len(seen) == batches.steps * min(rows, 8)
    assert epochs[0] != epochs[1] and epochs[0] == epochs[2]
    assert torch.cat(list(batches.all())).flatten().tolist() == list(range(rows))


def test_a_loader_is_taken_at_its_word() -> None:
    """Incomplete last batches included; its order depends on the seed alone, not on the generators outside."""
    batches = batches_of(DataLoader(torch.arange(20.0)[:, None], 8, shuffle=True), 99, torch.empty(0))
    epochs = []
    for seed in (1, 2, 1):
        torch.rand(5)
        epochs.append([b.flatten().tolist() for b in batches.epoch(seed)])
    assert [len(batch) for batch in epochs[0]] == [8, 8, 4]
    assert epochs[0] == epochs[2] != epochs[1]


def test_validation_weighs_every_row_the_same() -> None:
    """20 rows in batches of 8, 8 and 4; without noise in the codes the figure is a plain mean."""

    class Quiet(VAE):
        def validate(self, x: Tensor) -> dict[str, Tensor]:
            return {"mean": x.mean()}

    torch.manual_seed(0)
    model = Quiet(GaussianEncoder(mlp([X, H, 2 * Z])), decoder(), Z)
    rows = data() * torch.linspace(0, 1, 20)[:, None]
    done = fit(model, validation=rows, epochs=1)
    assert done.validation["mean"] == pytest.approx([rows.mean().item()], rel=1e-6)


def test_a_transform_sees_every_batch_and_changes_with_the_epoch() -> None:
    seen: list[Tensor] = []

    def transform(x: Tensor) -> Tensor:
        seen.append(torch.bernoulli(x / 255))
        return seen[-1]

    fit(vae(), (127 * torch.ones(16, X)).byte(), transform=transform, epochs=2)
    assert {len(x) for x in seen[1:]} == {8} and len(seen) == 5  # the first is looked at
    assert not torch.equal(seen[1], seen[3])


# numbers


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_seed_gives_the_same_numbers_and_leaves_the_generators_alone(objective: str) -> None:
    fits = []
    for outside in (1, 2):
        model = OBJECTIVES[objective]()
        torch.manual_seed(outside)
        expected = torch.rand(3)
        torch.manual_seed(outside)
        fits.append(fit(model, shuffled() if outside == 1 else shuffled(), validation=data()))
        assert torch.equal(torch.rand(3), expected)
    one, two = fits
    assert same(one.model, two.model) and one.validation == two.validation
    assert not same(one.model, fit(OBJECTIVES[objective](), seed=1).model)


def test_without_a_seed_torchs_generator_decides() -> None:
    def once(seed: int) -> LatentModel:
        model = vae()
        torch.manual_seed(seed)
        return fit(model, seed=None).model

    assert same(once(1), once(1)) and not same(once(1), once(2))


def test_training_raises_the_bound() -> None:
    """Two clusters of binary rows, whose entropy is log 2: the bound comes from 6 log 2 to within a nat of it."""
    rows = torch.tensor([[0.0] * X, [1.0] * X]).repeat(64, 1)
    done = fit(vae(hidden=32), rows, validation=rows, epochs=60, batch_size=32, lr=1e-2)
    assert done.history["model"][0] > 4.0
    assert done.validation["elbo"][-1] > -1.7


def test_watching_validating_and_averaging_change_nothing() -> None:
    watched = fit(vae(), validation=data(), ema=0.9, progress=True, callbacks=[lambda trainer: None])
    assert same(fit(vae()).model, watched.model)


# options


def test_callbacks_and_interrupts_keep_what_was_learned() -> None:
    def raise_at(step: int, error: BaseException, trainer: Trainer) -> None:
        if trainer.step_count == step:
            raise error

    for error, reason in ((KeyboardInterrupt(), "interrupted"), (StopTraining("enough"), "enough")):
        before = weights(model := vae())
        done = fit(model, callbacks=[partial(raise_at, 3, error)], validation=data())
        assert (done.stop_reason, done.epochs) == (reason, 1)
        assert len(done.history["model"]) == 3 and len(done.validation["elbo"]) == 1
        assert not torch.equal(before["encoder.network.0.weight"], model.encoder.network[0].weight)  # type: ignore[arg-type, index, union-attr]
        assert not model.training


def test_a_real_interrupt_while_it_validates_keeps_what_was_learned() -> None:
    class Interrupted(VAE):
        def validate(self, x: Tensor) -> dict[str, Tensor]:
            os.kill(os.getpid(), signal.SIGINT)
            return super().validate(x)

    torch.manual_seed(0)
    model = Interrupted(GaussianEncoder(mlp([X, H, 2 * Z])), decoder(), Z)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        done = fit(model, validation=data())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.stop_reason, done.validation) == ("interrupted", {})
    assert len(done.history["model"]) == 2


def test_the_running_average_is_that_of_the_weights() -> None:
    seen: list[Tensor] = []
    model = vae()
    bias = model.encoder.network[0].bias  # type: ignore[index, union-attr]
    done = fit(model, ema=0.75, callbacks=[lambda trainer: seen.append(bias.detach().clone())])
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.75 * expected + 0.25 * value
    assert done.averaged is not None and not done.averaged.training
    torch.testing.assert_close(done.averaged.encoder.network[0].bias, expected)  # type: ignore[index, union-attr]
    fit(model, ema=0.75)  # a second time: nothing of the first is left in the way


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_networks_in_bfloat16_train_as_in_float32(objective: str) -> None:
    """Within 0.05 nats; weights and losses stay in float32, and the networks are as before afterwards."""
    full, half = (fit(OBJECTIVES[objective](), precision=p, epochs=10) for p in ("float32", "bfloat16"))
    ours = [f.history["model"][-4:].mean() for f in (full, half)]
    assert ours[0] != ours[1] and abs(ours[0] - ours[1]) < 0.05
    assert all(w.dtype == torch.float32 for w in half.model.parameters())
    assert half.model.decoder(torch.zeros(1, Z)).mean.dtype == torch.float32
    assert "forward" not in half.model.decoder.network.__dict__  # type: ignore[union-attr]


# torch's compiler looks at the gradient of every tensor, and warns of that itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_fit_gives_the_numbers_of_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch's compiler, run without its code generation, which takes long; undone after the fit."""
    compile, calls, graphs = torch.compile, [], []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def traced(function: Any, **options: Any) -> Any:
        calls.append(options)
        return compile(function, backend=counted)

    monkeypatch.setattr(torch, "compile", traced)
    eager, done = fit(vae()), fit(vae(), compile="max-autotune")
    assert [call["mode"] for call in calls] == ["max-autotune"] * 2  # encoder and decoder; the prior has no weights
    assert len(graphs) >= 2  # networks of torch's own modules are traced too
    np.testing.assert_allclose(eager.history["model"], done.history["model"], rtol=1e-5)
    assert done.model.encoder._compiled_call_impl is None
    torch.compiler.reset()


def test_a_tight_bound_on_the_gradient_slows_the_first_step() -> None:
    """Adam's step is blind to a factor that is always the same, save for its epsilon."""
    moved = []
    for bound in (1e-10, 100.0):
        before = weights(model := vae())
        fit(model, clip_norm=bound, epochs=1, batch_size=20)
        moved.append(max((w - before[n]).abs().max() for n, w in weights(model).items()))
    assert moved[0] < 0.02 * moved[1]


def test_the_guard_says_where_values_cease_to_be_finite() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.sum(-1, keepdim=True).expand(*z.shape[:-1], X) * self.factor

    broken = Broken()
    broken.factor = nn.Parameter(torch.ones(()))
    torch.manual_seed(0)
    encoder = GaussianEncoder(mlp([X, H, 2 * Z]))
    model = VAE(encoder, Decoder(broken, BernoulliLikelihood([X])), Z)
    broken.factor.data.fill_(torch.nan)
    before = weights(model)
    with pytest.raises(NonFiniteError, match="the decoder gives no finite log density to 8 of 8 rows"):
        fit(model, max_skips=2)
    assert torch.equal(before["encoder.network.0.weight"], encoder.network[0].weight)  # type: ignore[index]
    poisoned = data()
    poisoned[11:] = torch.nan
    loader = DataLoader(poisoned, 4)  # its first batch is fine
    with pytest.raises(NonFiniteError, match="4 of the 4 rows of the batch are not finite"):
        fit(vae(), loader, max_skips=2)


def test_the_summary_says_it_all() -> None:
    text = str(fit(vae(), validation=data(), epochs=2))
    assert text.startswith("VAE: finished after 2 epochs, ")
    for part in (" rows/s; 0 turns skipped", "; validation elbo -"):
        assert part in text


# what is refused


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(X)


class Short:
    """A loader that ends before its length, as an iterator does in its second epoch."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Tensor]:
        return iter([data(8)])


class Numbers(nn.Module):
    """A network where a distribution should be."""

    def forward(self, z: Tensor) -> Tensor:
        return z


def holed() -> Tensor:
    rows = data()
    rows[3, 2] = torch.nan
    return rows


BAD_DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda: data(20, 5), ShapeError, r"must be of shape \[N, 6\], got \[20, 5\]"),
    "images without a channel": (lambda: torch.rand(4, 2, 3), ShapeError, r"x.flatten\(1\)"),
    "range": (lambda: 255 * data(), OptionError, "must be between 0 and 1, got values from 0 to 255.*by 255"),
    "negative": (lambda: -data(), OptionError, "values from -1 to"),
    "NaN pixels": (holed, ModelError, "must be finite, got 1 of 20 rows.*impute them"),
    "no rows": (lambda: data(0), ShapeError, r"Data must be at least one row, got shape \(0, 6\)"),
    "a number": (lambda: torch.tensor(1.0), ShapeError, "Data must be rows of real numbers"),
    "complex": (lambda: torch.zeros(4, X) * 1j, ShapeError, "complex64 of shape"),
    "words": (lambda: np.array(["a", "b"]), OptionError, "Data must be numbers"),
    "data and labels": (lambda: (data(), torch.arange(20)), OptionError, "pass the data alone"),
    "dictionary": (lambda: {"x": data()}, OptionError, "got dict\\."),
    "None": (lambda: None, OptionError, "must be a tensor or an array .*, got NoneType"),
    "empty loader": (lambda: DataLoader(data(5), 8, drop_last=True), OptionError, "Lower its batch_size"),
    "empty list": (lambda: [], OptionError, "The loader is empty"),
    "loader without length": (lambda: DataLoader(Endless(), 8), OptionError, "must have a length.*__len__"),
    "dataset without length": (Endless, OptionError, "must have a length.*__len__"),
    "iterator": (lambda: iter(data().split(8)), OptionError, "must have a length.*__len__"),
    "short loader": (Short, OptionError, "must give 3 batches.*, got 1. Is it an iterator"),
    "dict batches": (lambda: [{"x": data()}], OptionError, r"got a dictionary with keys \['x'\].*collate_fn"),
    "empty batches": (lambda: [()], OptionError, "an empty tuple"),
    "shape in a loader": (lambda: DataLoader(data(20, 5), 8), ShapeError, r"of shape \[N, 6\]"),
    "range in a loader": (lambda: DataLoader(255 * data(), 8), OptionError, "by 255"),
    "NaN in a loader": (lambda: DataLoader(holed(), 8), ModelError, "got 1 of 8 rows"),
}


# to validate is optional, and any number of batches will do for it
HELD_OUT = [case for case in BAD_DATA if case not in ("None", "short loader")]


@pytest.mark.parametrize(("role", "case"), [*product(["train"], BAD_DATA), *product(["validation"], HELD_OUT)])
def test_data_that_cannot_be_are_refused(role: str, case: str) -> None:
    """Before the first step, for those that were not caught in the act."""
    make, error, words = BAD_DATA[case]
    model = vae()
    before = weights(model)
    with pytest.raises(error, match=f"(?s){words}"):
        model.fit(**{"train": data(), role: make()}, epochs=1, progress=False, device="cpu", seed=0)
    assert case == "short loader" or same_weights(before, weights(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs must be"),
        ({"epochs": 2.5}, "epochs must be an int >= .*, got 2.5"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"num_particles": 0}, "num_particles must be"),
        ({"adversary_steps": -1}, "adversary_steps must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"adversary_lr": (1e-3, -1.0)}, "adversary_lr must be"),
        ({"precision": "bfloat"}, "precision must be one of .*, got 'bfloat'.*Did you mean 'bfloat16'"),
        ({"compile": "autotune"}, "compile must be one of .*, got 'autotune'.*'max-autotune'"),
        ({"ema": 1.0}, "ema must be between 0 and 1, got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be"),
        ({"max_skips": 0}, "max_skips must be"),
        ({"device": "gpu"}, "device must be 'auto', 'cpu' or a GPU that is present, got 'gpu'"),
        ({"device": "meta"}, "device must be .*, got 'meta'"),
        ({"device": "cuda:99"}, "device must be .*, got 'cuda:99'"),
        ({"callbacks": print}, r"callbacks must be a list of functions, got .*callbacks=\[callback\]"),
        ({"callbacks": [3]}, "callbacks must be a function of the trainer, got 3"),
        ({"transform": "bernoulli"}, "transform must be a function of a batch, got 'bernoulli'"),
        ({"transform": lambda x: x[:, :3]}, r"of shape \[N, 6\], got \[8, 3\]"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ImplicitVIError, match=words):
        fit(vae(), **options)


def test_a_misspelt_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"LatentModel.fit\(\) got .* argument 'epoch'. Did you mean 'epochs'\?"):
        fit(vae(), epoch=3)
    with pytest.raises(TypeError, match="Did you mean 'validation'"):
        fit(vae(), validaton=data())


def test_every_option_has_one_type_and_is_shown_by_fit() -> None:
    """The dictionary for type checkers is that of the declaration, and so are signature and docstring."""
    assert get_type_hints(FitOptions) == get_type_hints(FitSettings)
    parameters = inspect.signature(LatentModel.fit).parameters
    assert {f.name: f.default for f in fields(FitSettings)}.items() <= {
        p.name: p.default for p in parameters.values()
    }.items()
    for text in (inspect.getdoc(LatentModel.fit), inspect.getdoc(FitSettings)):
        assert text is not None and all(f"    {f.name}: {f.metadata['doc'][:30]}" in text for f in fields(FitSettings))


def test_settings_are_options_as_a_value() -> None:
    settings = FitSettings(epochs=2, batch_size=8, seed=0, progress=False, device="cpu")
    given, whole = vae(), vae()
    given.fit(data(), settings=settings, epochs=3)
    fit(whole)
    assert same(given, whole)
    with pytest.raises(OptionError, match="ema must be between 0 and 1, got 2"):
        FitSettings(ema=2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: likelihood_of("bernouli", [X]), "likelihood must be one of .*Did you mean 'bernoulli'"),
        (
            lambda: AVB(avb().encoder, decoder(), lambda n: torch.randn(n, Z), nn.Identity(), contrast="gaussian"),
            "The prior must have a density for Adaptive Contrast.*contrast='prior'",
        ),
        (
            lambda: VAE(vae().encoder, decoder(), lambda n: torch.randn(n, Z)),
            r"prior of VAE must have a density \(log_prob\), got Implicit",
        ),
        (
            lambda: VAE(vae().encoder, Numbers(), Z),
            "value of the decoder must be a torch.distributions.Distribution, got Tensor.*Decoder, GaussianEncoder",
        ),
        (lambda: VAE(vae().encoder, decoder(z_dim=3), 3), "codes of encoder and prior must be equal, got 2 and 3"),
        (lambda: VAE(vae().encoder, decoder(z_dim=3), Z), r"The decoder does not accept its input of shape \(2, 2\)"),
        (lambda: VAE(vae().encoder, decoder(x_dim=5), Z), r"The encoder does not accept its input of shape \(2, 5\)"),
        (lambda: VAE(avb().encoder, decoder(), Z), "encoder of VAE must have a density"),
    ],
    ids=[
        "likelihood",
        "AC's prior",
        "VAE's prior",
        "tensor",
        "dimensions",
        "decoder and prior",
        "encoder and decoder",
        "VAE's encoder",
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ImplicitVIError, match=words):
        make()


def test_encode_takes_what_fit_takes() -> None:
    model = vae()
    assert model.encode(data().double().numpy()).shape == (20, Z)
    assert isinstance(model.prior(), torch.distributions.Distribution)
    assert not isinstance(model.encoder(data()), Implicit)


def test_the_benchmark_shows_what_was_measured() -> None:
    """Its table comes from the results file, and that from `make bench-vae`."""
    import vae_bench

    shown = vae_bench.table(json.loads(vae_bench.OUTPUT.read_text(encoding="utf-8")))
    assert vae_bench.OUTPUT.with_suffix(".md").read_text(encoding="utf-8") == shown
