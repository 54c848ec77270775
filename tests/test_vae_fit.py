"""Training of latent variable models: data of every kind, exact numbers, options, and what is refused."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from implicitvi import Checkpoint, StopTraining
from implicitvi.avb.adversaries import PairwiseAdversary
from implicitvi.avb.samplers import NoiseBasisSampler
from implicitvi.errors import CheckpointError, ImplicitVIError, ModelError, NonFiniteError, OptionError, ShapeError
from implicitvi.nn import mlp
from implicitvi.training import Trainer
from implicitvi.training.trainer import LOOK_EVERY
from implicitvi.vae import AAE, ASVAE, AVB, VAE
from implicitvi.vae.data import batches_of
from implicitvi.vae.decoders import BernoulliLikelihood, Decoder, GaussianLikelihood, likelihood_of
from implicitvi.vae.distributions import Implicit
from implicitvi.vae.encoders import GaussianEncoder, ImplicitEncoder
from implicitvi.vae.fitting import VAEFit, _Look
from implicitvi.vae.model import LatentModel
from implicitvi.vae.settings import FitOptions, FitSettings
from vae_contracts import SYSTEMS

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
    with pytest.raises(ModelError, match=r"Batch 3 of epoch 1 cannot be used\. Data must be finite, got 1 of 4 rows"):
        fit(vae(), loader)


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


# never silently wrong


def fresh(network: nn.Module) -> VAE:
    return VAE(GaussianEncoder(network), decoder(), Z)


def halved_in_place(x: Tensor) -> Tensor:
    return x.mul_(0.5)


@pytest.mark.parametrize("kind", ["tensor", "float32 array", "list of batches", "batches of tuples"])
def test_the_users_data_are_never_written_to(kind: str) -> None:
    """A transform may work in place: on data and on validation data, as rows or as batches that the user holds."""
    rows, batches = data(), [data(8), data(8)]
    given = {"tensor": rows, "float32 array": rows.numpy(), "list of batches": batches}.get(
        kind, [(b,) for b in batches]
    )
    fit(vae(), given, validation=given, transform=halved_in_place)
    assert torch.equal(rows, data()) and all(torch.equal(batch, data(8)) for batch in batches)


def test_networks_that_change_their_input_are_refused() -> None:
    with pytest.raises(ModelError, match="The encoder must not change its input in place"):
        fresh(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(X, 2 * Z)))
    with pytest.raises(ModelError, match="The decoder must not change its input in place"):
        network = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(Z, X))
        VAE(vae().encoder, Decoder(network, BernoulliLikelihood([X])), Z)


def one_hot(x: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(x[:, 0].long(), X).float()


LATER: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception], str]] = {
    "range": (lambda x: 255 * x, OptionError, r"from 0 to 255 in 8 of 8 rows \(first: 0\)"),
    "negative": (lambda x: x.where(torch.arange(8)[:, None] < 5, -5.0), OptionError, r"in 3 of 8 rows \(first: 5\)"),
    "NaN": (lambda x: x.where(torch.arange(8)[:, None] != 2, torch.nan), ModelError, r"1 of 8 rows \(first: 2\)"),
    "infinite": (lambda x: x / 0, ModelError, "Data must be finite, got 8 of 8 rows"),
    "shape": (lambda x: x[:, :5], ShapeError, r"of shape \[N, 6\], got \[8, 5\]"),
    "no rows": (lambda x: x[:0], ShapeError, "at least one row"),
    "no tensor": (lambda x: "words", OptionError, "must be numbers"),  # type: ignore[return-value, arg-type]
}


@pytest.mark.parametrize(("case", "door"), [*product(LATER, ["loader", "validation", "transform", "tuples"])])
def test_every_batch_is_looked_at(case: str, door: str) -> None:
    """Not only the first; the error names the batch and its first bad row, and the model is not left in training."""
    spoil, error, words = LATER[case]
    batches = [data(8), spoil(data(8))]
    number, model = 0, vae()

    def transform(x: Tensor) -> Tensor:
        nonlocal number
        number += 1
        return spoil(x) if number == 3 else x  # the first is looked at before the first step

    given: dict[str, Any] = {
        "loader": {"train": batches},
        "validation": {"validation": batches},
        "transform": {"train": data(24), "transform": transform},
        "tuples": {"train": [(b.double() if isinstance(b, Tensor) else b, 0) for b in batches]},
    }[door]
    with pytest.raises(error, match=f"(?s){words}"):
        fit(model, **given)
    assert not model.training


def test_of_the_batch_and_of_one_hot_data_the_place_is_named() -> None:
    with pytest.raises(
        OptionError, match=r"^Batch 2 of the validation data after epoch 1 cannot be used\. Data of a Ber"
    ):
        fit(vae(), validation=[data(8), 2 * data(8)])
    torch.manual_seed(0)
    model = VAE(GaussianEncoder(mlp([X, H, 2 * Z])), Decoder(mlp([Z, H, X]), likelihood_of("categorical", [X])), Z)
    rows = one_hot(data())
    rows[5] = 0.5
    with pytest.raises(
        OptionError, match=r"Batch 2 of epoch 1 .* one-hot along the last axis, got others in 1 of 8 rows"
    ):
        fit(model, [one_hot(data(8)), rows[:8]])


def test_on_an_accelerator_verdicts_are_read_later_and_the_batch_is_named() -> None:
    look = _Look(vae(), "of epoch 3", at_once=False)
    for _ in range(LOOK_EVERY - 1):
        look(data(8))
    with pytest.raises(ModelError, match="Batch 10 of epoch 3 must have finite values, within the limits"):
        look(2 * data(8))
    look(data(8))
    look(data(8) / 0)
    with pytest.raises(ModelError, match="Batch 12 of epoch 3"):
        look.read()
    look.read()


def test_a_likelihood_of_ones_own_is_asked_about_every_batch() -> None:
    class Positive(GaussianLikelihood):
        def check(self, x: Tensor) -> None:
            if (x < 0).any():
                raise OptionError("Data must be positive.")

    model = VAE(GaussianEncoder(mlp([X, H, 2 * Z])), Decoder(mlp([Z, H, X]), Positive([X])), Z)
    with pytest.raises(OptionError, match=r"Batch 2 of epoch 1 cannot be used\. Data must be positive"):
        fit(model, [data(8), -data(8)])


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "float64": lambda x: x.double(),
    "whole numbers": lambda x: x.long(),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "gradients": lambda x: x.clone().requires_grad_(),
    "inference": torch.inference_mode()(lambda x: 1 * x),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_what_a_transform_returns_is_brought_to_the_model(kind: str) -> None:
    assert same(fit(vae(), transform=TRANSFORMS[kind]).model, fit(vae()).model)


@pytest.mark.parametrize("kind", ["uint16", "float16", "uint64", "with gradients", "of inference mode"])
def test_data_of_unusual_kinds_give_the_numbers_of_plain_ones(kind: str, tmp_path: Path) -> None:
    given: Any = {
        "uint16": lambda: data().numpy().astype("uint16"),
        "float16": lambda: data().half(),
        "uint64": lambda: data().to(torch.uint64),
        "with gradients": lambda: data().requires_grad_(),
        "of inference mode": torch.inference_mode()(lambda: data().clone()),
    }[kind]()
    assert same(fit(vae(), given, checkpoint=tmp_path).model, fit(vae()).model)


class Unnumbered(Dataset[Any]):
    def __getitem__(self, index: int) -> Tensor:
        return data()[index]


def closed_over(scale: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * scale


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"train": DataLoader(data(), 8)}, {"train": DataLoader(1 - data(), 8)}, "its data must be 20 items"),
        ({"train": Rows(data())}, {"train": Rows(1 - data())}, "its data must be 20 items of a Rows"),
        ({"train": DataLoader(data(), 8)}, {"train": DataLoader(data(), 8, shuffle=True)}, ""),
        (
            {"train": list(data().split(10))},
            {"train": list((1 - data()).split(10))},
            "its data must be 2 items of a li",
        ),
        (
            {"train": DataLoader(data(), 10), "batch_size": 10},
            {"train": data(), "batch_size": 10},
            "its data must be 20 rows",
        ),
        ({"validation": data()}, {"validation": 1 - data()}, "its validation must be 20 rows"),
        ({"validation": data()}, {}, ""),
        ({}, {"transform": torch.bernoulli}, "its transform must be .*bernoulli.*, got none"),
        ({"transform": torch.bernoulli}, {"transform": torch.abs}, "its transform must be .*abs"),
        ({"transform": lambda x: x * 0.5}, {"transform": lambda x: x * 0.25}, "its transform"),
        ({"transform": closed_over(0.5)}, {"transform": closed_over(0.25)}, "its transform"),
        ({"transform": partial(torch.mul, other=0.5)}, {"transform": partial(torch.mul, other=0.1)}, "its transform"),
        ({"transform": nn.Dropout(0.0)}, {"transform": nn.Threshold(0.0, 0.0)}, "its transform"),
        ({"transform": closed_over(0.5)}, {"transform": closed_over(0.5)}, ""),
        ({"lr": [1e-3, 1e-4]}, {"lr": (1e-3, 1e-4)}, ""),
        ({"lr": np.float64(1e-3), "seed": np.int64(0)}, {"lr": 1e-3}, ""),
        ({"ema": 0.5}, {"ema": 0.6}, "ema: 0.6"),
    ],
)
def test_a_checkpoint_is_not_resumed_with_other_data_or_another_transform(
    before: dict[str, Any], after: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Without words the second fit resumes."""
    fit(vae(), checkpoint=tmp_path, **before)
    if words:
        with pytest.raises(CheckpointError, match=words):
            fit(vae(), checkpoint=tmp_path, **after)
    else:
        assert fit(vae(), checkpoint=tmp_path, **after).resumed == 3


def test_a_checkpoint_is_not_resumed_by_another_objective(tmp_path: Path) -> None:
    """Of the same class, with the same weights."""
    torch.manual_seed(0)
    fit(VAE(vae().encoder, decoder(), Z), checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="its model must be num_importance: 3, got num_importance: 1"):
        fit(VAE(vae().encoder, decoder(), Z, num_importance=3), checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="its model must be encoder.network.1: Tanh, got encoder.network.1: ELU"):
        fit(VAE(GaussianEncoder(mlp([X, H, 2 * Z], nn.Tanh)), decoder(), Z), checkpoint=tmp_path)
    (frozen := vae()).decoder.requires_grad_(False)
    with pytest.raises(CheckpointError, match="its frozen weights must be"):
        fit(frozen, checkpoint=tmp_path)


class Drawing(Rows):
    """Rows augmented by numpy's global generator."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index] * float(np.random.rand()), index


class Moving(Rows):
    """Rows augmented by a generator of the dataset's own."""

    generator = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index] * float(self.generator.random()), index


@pytest.mark.parametrize("kind", [Drawing, Moving])
def test_to_recognise_data_takes_no_random_numbers_and_no_augmentation_is_refused(
    kind: Callable[[Tensor], Rows], tmp_path: Path
) -> None:
    outside = np.random.get_state()
    try:
        fit(vae(), DataLoader(kind(data()), 8))
        after = np.random.rand()
        np.random.set_state(outside)
        fit(vae(), DataLoader(kind(data()), 8), checkpoint=tmp_path)
        assert np.random.rand() == after
        assert fit(vae(), DataLoader(kind(data()), 8), checkpoint=tmp_path).resumed == 3
    finally:
        np.random.set_state(outside)


def test_folders_are_checked_before_the_first_step(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (3, b"abc", file, file / "x"):
        with pytest.raises(OptionError, match="folder must be"):
            fit(vae(), checkpoint=folder, callbacks=[lambda trainer: pytest.fail("a step was taken")])


def test_one_folder_for_the_states_of_epochs_and_of_steps_is_refused(tmp_path: Path) -> None:
    words = "checkpoint must not be the folder of a callback"
    same_folder = tmp_path / ".." / tmp_path.name
    for callback, folder in (
        (Checkpoint(tmp_path), tmp_path),
        (Checkpoint(same_folder), str(tmp_path)),
        (Checkpoint(tmp_path, best=lambda trainer: 0.0), tmp_path / "best"),
    ):
        with pytest.raises(OptionError, match=words):
            FitSettings(checkpoint=folder, callbacks=[callback])
    FitSettings(checkpoint=tmp_path / "best", callbacks=[Checkpoint(tmp_path)])
    with pytest.raises(OptionError, match=words):
        fit(vae(), checkpoint=tmp_path, callbacks=[lambda trainer: trainer.save(tmp_path)])
    assert fit(vae(), checkpoint=tmp_path, callbacks=[Checkpoint(tmp_path / "steps", every=2)]).resumed == 0
    assert fit(vae(), checkpoint=tmp_path).resumed == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("turn", [0, 3])
def test_a_fit_interrupted_between_two_turns_resumes_as_if_it_had_not_been(
    objective: str, turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same model: in the first epoch, whose start is stored, and later."""
    whole = fit(OBJECTIVES[objective]())
    model, turns = OBJECTIVES[objective](), iter(range(99))
    loss = model._loss  # type: ignore[operator]

    def interrupted(*args: Any) -> Any:
        if next(turns) == turn:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(model, "_loss", interrupted)
    assert fit(model, checkpoint=tmp_path).stop_reason == "interrupted"
    again = fit(model, checkpoint=tmp_path)
    assert again.stop_reason == "finished" and again.resumed == turn // 2
    assert same(model, whole.model)
    assert all(np.array_equal(whole.history[name], again.history[name]) for name in whole.history.names())


def test_options_may_change_until_an_epoch_is_complete(tmp_path: Path) -> None:
    def stop(trainer: Trainer) -> None:
        raise StopTraining("at once")

    fit(vae(), checkpoint=tmp_path, callbacks=[stop])
    assert same(fit(vae(1), checkpoint=tmp_path, lr=1e-2).model, fit(vae(1), lr=1e-2).model)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_frozen_stays_and_the_rest_learns(name: str, part: str) -> None:
    model = SYSTEMS[name]()
    model.get_submodule(part).requires_grad_(False)
    before = weights(model)
    fit(model, data(20, 4), epochs=1)
    moved = {key.split(".")[0] for key, value in weights(model).items() if not value.equal(before[key])}
    assert part not in moved and moved


def test_frozen_models_and_adversaries_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"The model must have weights to train, and all of them are frozen\. Call req"
    ):
        fit(vae().requires_grad_(False))
    (model := avb()).adversary.requires_grad_(False)
    with pytest.raises(ModelError, match="The adversary must have weights to train"):
        fit(model)
    (model := avb()).requires_grad_(False).adversary.requires_grad_(True)
    with pytest.raises(ModelError, match="The model must have weights to train"):
        fit(model)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_fit_needs_no_gradients_around_it(around: Any) -> None:
    whole, model = fit(vae(), validation=data()), vae()
    with around():
        done = fit(model, validation=data())
        evidence = model.log_evidence(data(2), num_steps=3)
    assert same(model, whole.model) and done.validation == whole.validation
    assert torch.equal(evidence, whole.model.log_evidence(data(2), num_steps=3))


def test_weights_that_cannot_be_trained_are_refused() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ModelError, match=r"weights must be float32 or float64, got torch.*precision='bfloat16'"):
            fit(vae().to(dtype))
        with pytest.raises(ModelError, match="weights must be float32 or float64"):
            vae().to(dtype).log_evidence(data(2))
    with torch.inference_mode():
        model = vae()
    with pytest.raises(ModelError, match=r"ordinary tensors, got inference tensors\. Make the model outside"):
        fit(model)


def test_an_averaged_adversary_follows_its_model_to_another_dtype() -> None:
    """It is not one of the model's modules, and its buffers are new tensors after the move."""
    model = avb(averaging=0.5, informed=True).double()
    done = fit(model)
    (average, latest) = ([*network.buffers()] for network in (model._objective.average, model.adversary))  # type: ignore[union-attr]
    assert done.skipped == 0 and len(average) > 0
    assert all(a.dtype == torch.float64 and torch.equal(a, b) for a, b in zip(average, latest, strict=True))


class Failing(Rows):
    """A dataset with a file that cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 17:
            raise ValueError("broken")
        return self.rows[index], index


@pytest.mark.parametrize("case", ["finished", "interrupted", "broken", "bad", "broken validation"])
def test_worker_processes_of_a_loader_are_gone_after_the_fit(case: str) -> None:
    def interrupt(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    rows = torch.cat([data(8), 2 * data(12)]) if case == "bad" else data()
    loader = DataLoader(Failing(rows) if "broken" in case else TensorDataset(rows), 8, num_workers=1)
    given = {"train": data(), "validation": loader} if case == "broken validation" else {"train": loader}
    caught: list[BaseException] = []  # its traceback keeps the frames of the fit
    try:
        fit(vae(), epochs=1, callbacks=[interrupt] if case == "interrupted" else [], **given)
    except (ValueError, OptionError) as error:
        caught.append(error)
    assert bool(caught) == (case not in ("finished", "interrupted"))
    assert not set(multiprocessing.active_children()) - before


MISUSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "encode(x, -1)": (lambda: vae().encode(data(), -1), OptionError, "num_samples must be an int >= 1, got -1"),
    "encode(x, 1.5)": (lambda: vae().encode(data(), 1.5), OptionError, "num_samples must be an int >= 1, got 1.5"),  # type: ignore[arg-type]
    "encode(x, 0)": (lambda: vae().encode(data(), 0), OptionError, "num_samples must be an int >= 1, got 0"),
    "encode(no rows)": (lambda: vae().encode(data(0)), ShapeError, "at least one row"),
    "encode(None)": (lambda: vae().encode(None), OptionError, "Data must be numbers"),  # type: ignore[arg-type]
    "encode(words)": (lambda: vae().encode("ab"), OptionError, "Data must be numbers"),  # type: ignore[arg-type]
    "encode(sparse)": (lambda: vae().encode(data().to_sparse()), ShapeError, r"a dense tensor with values.*to_dense"),
    "reconstruct(255 x)": (lambda: vae().reconstruct(255 * data()), OptionError, "by 255"),
    "decode(None)": (lambda: vae().decode(None), OptionError, "Codes must be numbers"),  # type: ignore[arg-type]
    "decode(NaN)": (
        lambda: vae().decode(torch.full((3, Z), torch.nan)),
        ModelError,
        "Codes must be finite, got others in 3",
    ),
    "decode(5 dims)": (
        lambda: vae().decode(torch.zeros(3, 5)),
        ShapeError,
        r"Codes must be of shape \[..., 2\], got \[3, 5\]",
    ),
    "sample('3')": (lambda: vae().sample("3"), OptionError, "num_samples must be an int"),  # type: ignore[arg-type]
    "elbo of images without channel": (
        lambda: VAE.dense((1, 2, 3), Z, hidden=(H,)).elbo(torch.rand(4, 2, 3)),
        ShapeError,
        r"of shape \[N, 1, 2, 3\], got \[4, 2, 3\]",
    ),
    "log_joint of rows": (lambda: vae().log_joint(torch.zeros(4, Z), data(4, 5)), ShapeError, r"got \[4, 5\]"),
    "log_evidence(no rows)": (lambda: vae().log_evidence(data(0)), ShapeError, "at least one row"),
    "log_evidence(num_step=5)": (
        lambda: vae().log_evidence(data(), num_step=5),
        TypeError,
        "unexpected keyword argument 'num_step' for method 'ais'. Did you mean 'num_steps'?",
    ),
    "log_evidence(loc=1)": (lambda: vae().log_evidence(data(), loc=1), TypeError, "argument 'loc' for method 'ais'"),
    "log_evidence('iwae', num_steps=5)": (
        lambda: vae().log_evidence(data(), "iwae", num_steps=5),
        TypeError,
        "'num_steps' for method 'iwae'",
    ),
    "log_evidence(seed='a')": (lambda: vae().log_evidence(data(), seed="a"), OptionError, "seed must be an int"),  # type: ignore[arg-type]
    "fit(seed=1.5)": (lambda: fit(vae(), seed=1.5), OptionError, "seed must be an int >= 0, got 1.5"),
    "fit(seed=2**70)": (
        lambda: fit(vae(), seed=2**70),
        OptionError,
        "seed must be an int >= 0 and <= 18446744073709551615",
    ),
    "fit(ema='0.9')": (lambda: fit(vae(), ema="0.9"), OptionError, "ema must be between 0 and 1, got '0.9'"),
    "fit(sparse)": (
        lambda: fit(vae(), data().to_sparse()),
        ShapeError,
        "a dense tensor with values, got torch.sparse_coo",
    ),
    "fit(meta)": (lambda: fit(vae(), data().to("meta")), ShapeError, "a dense tensor with values, got a meta tensor"),
    "fit(masked)": (lambda: fit(vae(), np.ma.array(data().numpy())), OptionError, "an array without a mask"),
    "fit(Dataset without a length)": (lambda: fit(vae(), Unnumbered()), OptionError, "must have a length.*__len__"),
    "VAE(None, None, None)": (
        lambda: VAE(None, None, None),
        ModelError,
        "The encoder must be a torch.nn.Module, got NoneType",
    ),  # type: ignore[arg-type]
    "VAE(a class)": (
        lambda: VAE(GaussianEncoder, decoder(), Z),  # type: ignore[arg-type]
        ModelError,
        "got the class GaussianEncoder",
    ),
    "VAE(prior=None)": (
        lambda: VAE(vae().encoder, decoder(), None),
        OptionError,
        "prior must be a number of dimensions",
    ),
    "VAE(prior=2.0)": (
        lambda: VAE(vae().encoder, decoder(), 2.0),
        OptionError,
        "prior must be a number of dim.*got 2.0",
    ),
    "VAE(draws that are lists)": (
        lambda: VAE(vae().encoder, decoder(), lambda n: [[0.0] * Z] * n),
        ShapeError,
        r"must be a tensor of shape \(2, D\), got list",
    ),
    "AVB(adversary=None)": (
        lambda: AVB(avb().encoder, decoder(), Z, None),  # type: ignore[arg-type]
        ModelError,
        "The adversary must be a torch.nn.Module, got NoneType",
    ),
    "AVB(adversary of the wrong size)": (
        lambda: AVB(avb().encoder, decoder(), Z, PairwiseAdversary(mlp([5, H]), mlp([Z, H]))),
        ShapeError,
        r"The adversary does not accept pairs \(2, 3, 2\) and \(3, 6\): mat1 and mat2",
    ),
    "AVB(scores with an axis too many)": (
        lambda: AVB(avb().encoder, decoder(), Z, Trailing(avb().adversary)),
        ShapeError,
        r"Scores of the adversary .* must be of shape \(2, 3\), got \(2, 3, 1\)\. Leave out the last axis",
    ),
    "AAE(an adversary of pairs)": (
        lambda: AAE(vae().encoder, decoder(), Z, avb().adversary),
        ShapeError,
        r"The adversary does not accept codes \(2, 3, 2\)",
    ),
    "ASVAE(scores with an axis too many)": (
        lambda: ASVAE(*asvae_parts(), Trailing(avb().adversary), avb().adversary),
        ShapeError,
        "Scores of the encoder_adversary",
    ),
    "VAE.dense(6, 1.5)": (lambda: VAE.dense(X, 1.5), OptionError, "z_dim must be an int >= 1, got 1.5"),  # type: ignore[arg-type]
    "VAE.dense(None, 2)": (lambda: VAE.dense(None, Z), OptionError, "x_shape must be an int >= 1, got None"),  # type: ignore[arg-type]
    "VAE.dense(hidden=8)": (
        lambda: VAE.dense(X, Z, hidden=8),
        OptionError,
        "hidden must be a sequence of whole numbers",
    ),  # type: ignore[arg-type]
    "VAE.dense(hidden=(8.5,))": (
        lambda: VAE.dense(X, Z, hidden=(8.5,)),
        OptionError,
        "hidden must be an int >= 1, got 8.5",
    ),  # type: ignore[arg-type]
    "VAE.convolutional(channels=8)": (
        lambda: VAE.convolutional((1, 4, 4), Z, channels=8),  # type: ignore[arg-type]
        OptionError,
        "channels must be a sequence",
    ),
    "VAE.build(None, 2)": (lambda: VAE.build(None, Z), OptionError, r"networks must be an Architecture, such as Dense"),  # type: ignore[arg-type]
}


class Trailing(nn.Module):
    """An adversary whose scores have an axis of length 1 at their end."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        scores: Tensor = self.inner(*inputs)
        return scores[..., None]


def asvae_parts() -> tuple[nn.Module, nn.Module, int]:
    return vae().encoder, Decoder(mlp([Z, H, X]), likelihood_of("straight_through", [X])), Z


@pytest.mark.parametrize("case", MISUSES)
def test_misuse_is_refused_by_name(case: str) -> None:
    call, error, words = MISUSES[case]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


@pytest.mark.parametrize("kind", ["float64", "whole numbers", "array", "list"])
def test_codes_of_every_kind_are_decoded(kind: str) -> None:
    codes, model = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), vae()
    given: Any = {"float64": codes.double(), "whole numbers": codes.long(), "array": codes.numpy()}.get(
        kind, codes.tolist()
    )
    assert torch.equal(model.decode(given), model.decode(codes))


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.mark.parametrize("copied", [deepcopy, pickled])
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_copy_trains_by_itself_and_to_the_same_numbers(name: str, copied: Callable[[Any], Any]) -> None:
    """Of a model before it is trained, and of the whole result of a fit."""
    torch.manual_seed(0)
    rows, model = data(20, 4), SYSTEMS[name]()
    copy = copied(model)
    done, other = (fit(each, rows, epochs=1) for each in (model, copy))
    assert same(done.model, other.model)
    again, before = copied(done), weights(model)
    assert str(again) == str(done)
    fit(again.model, rows, epochs=1)
    assert same_weights(before, weights(model)) and not same(again.model, model)
    assert same(fit(model, rows, epochs=1).model, again.model)


def test_the_benchmark_shows_what_was_measured() -> None:
    """Its table comes from the results file, and that from `make bench-vae`."""
    import vae_bench

    shown = vae_bench.table(json.loads(vae_bench.OUTPUT.read_text(encoding="utf-8")))
    assert vae_bench.OUTPUT.with_suffix(".md").read_text(encoding="utf-8") == shown
