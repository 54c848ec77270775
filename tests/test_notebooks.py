"""In a notebook, fits are shown as tables and progress as a bar of widgets."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from implicitvi import AVBSVI, Fit, ImplicitGuide
from implicitvi.vae import VAE

ROOT = Path(__file__).parents[1]
Y = torch.tensor([0.5, -0.3, 1.0])


class Table(HTMLParser):
    """A parser of a table's cells and the title above; fails if a tag is not closed."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.title = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open[-1] == "p":
            self.title += data


def fitted(model: Any, *args: Any, guide: Any = None, **kwargs: Any) -> Fit:
    svi = AVBSVI(
        model, guide or ImplicitGuide(model), num_steps=4, num_particles=16, warm_start=5, progress=False, seed=0
    )
    return svi.run(*args, **kwargs)


def two_sites(y: Tensor) -> None:
    a = pyro.sample("a<b", dist.Normal(0.0, 1.0))
    pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, noise), obs=y)


@pytest.mark.uses_param_store
def test_a_fit_is_a_table_of_its_posterior() -> None:
    fit = fitted(two_sites, Y)
    table = Table(fit._repr_html_())
    assert table.title == str(fit)
    header, noise, *sites = table.rows
    assert header == ["", "mean", "sd", "5%", "50%", "95%"]
    assert noise[:2] == ["noise (parameter)", f"{fit.parameters['noise']:.3f}"]
    assert [row[0] for row in sites] == ["a<b", "w[0]", "w[1]"]
    draws = fit.guide.sample(20_000)["a<b"]
    mean, sd, *marks = map(float, sites[0][1:])
    assert abs(mean - draws.mean().item()) < 5 * draws.std().item() / 1000**0.5
    assert abs(sd / draws.std().item() - 1) < 5 / 2000**0.5
    assert marks == sorted(marks)


@pytest.mark.uses_param_store
def test_looking_at_a_fit_changes_no_random_number() -> None:
    fit = fitted(two_sites, Y)
    before = torch.get_rng_state()
    first = fit._repr_html_()
    assert torch.equal(torch.get_rng_state(), before)
    assert fit._repr_html_() == first


def test_of_many_latents_the_first_are_shown() -> None:
    def many(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([30]).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)

    rows = Table(fitted(many, Y[0])._repr_html_()).rows
    assert len(rows) == 1 + 20 + 1 and rows[20][0] == "w[19]" and rows[-1][0] == "and 10 more"


@pytest.mark.uses_param_store
def test_an_amortized_fit_shows_its_parameters_and_the_latents_of_its_data() -> None:
    def local(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = ImplicitGuide(local, amortize={"data": lambda y: y[:, None]})
    table = Table(fitted(local, Y, guide=guide)._repr_html_())
    assert [row[0] for row in table.rows] == ["", "scale (parameter)", "z[0]", "z[1]", "z[2]"]


def test_a_fit_of_a_latent_variable_model_is_a_table_of_its_metrics() -> None:
    x = torch.rand(40, 6).round()
    model = VAE.dense(6, 2, hidden=(8,))
    fit = model.fit(x, validation=x[:8], epochs=3, batch_size=10, seed=0, progress=False)
    table = Table(fit._repr_html_())
    assert table.title == str(fit)
    rows = {name: cells for name, *cells in table.rows}
    assert rows["model"] == [f"{fit.history['model'][0]:.3f}", f"{fit.history['model'][-1]:.3f}"]
    name, values = next(iter(fit.validation.items()))
    assert rows[f"validation {name}"] == [f"{values[0]:.3f}", f"{values[-1]:.3f}"]


# The parts of a Jupyter kernel that tqdm uses: a shell, widgets that are displayed, and its own stderr.
KERNEL = """
import sys, types

class Widget:
    def __init__(self, children=(), **options):
        self.children, self.value, self.bar_style = list(children), 0, ""
        self.layout, self.style = types.SimpleNamespace(), types.SimpleNamespace(bar_color=None)
        self.__dict__.update(options)

def module(name, **members):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(members)
    return sys.modules[name]

shell = types.SimpleNamespace(config={"IPKernelApp": {}})
shown = []
display = module("IPython.display", display=shown.append)
module("IPython", get_ipython=lambda: shell, display=display)
module("ipykernel.zmqshell")
module("ipywidgets", HTML=Widget, FloatProgress=Widget, HBox=Widget)

class OutStream:
    def write(self, text): pass
    def flush(self): pass
OutStream.__module__ = "ipykernel.iostream"
sys.stderr = OutStream()
"""
FIT = """
import torch
from implicitvi.vae import VAE
mid = []
watch = lambda trainer: mid.append(shown[0].children[1].value)
VAE.dense(6, 2, hidden=(8,)).fit(
    torch.rand(400, 6).round(), epochs=20, batch_size=10, seed=0, callbacks=[watch]
)
(box,) = shown
_, bar, text = box.children
print(bar.value, bar.max, bar.bar_style, len(set(mid)) > 3)
print(text.value)
"""


def test_progress_is_a_bar_of_widgets_that_moves() -> None:
    command = [sys.executable, "-W", "error", "-c", KERNEL + FIT]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures, text = done.stdout.splitlines()
    assert figures == "800 800 success True"
    assert "800/800" in text and re.search(r"model=\d+\.\d{3}", text)
