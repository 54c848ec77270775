"""How good the defaults are on Eight Schools: `make accuracy` runs this and writes ``docs/results/accuracy.json``.

Three posteriors, one configuration. The paper's data have two modes, and exact draws; the two forms of
posteriordb's have a reference of 10 000 draws, which is looked for in ``$IMPLICITVI_DATA/posteriors`` and
otherwise in a ``shared/data/posteriors`` beside the checkout. Without it that part is left out, and said to be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch import Tensor

from implicitvi import AVBSVI, ImplicitGuide
from implicitvi.datasets import eight_schools
from implicitvi.evaluation import c2st, knn_kl, mean_error, sd_ratio, whiten

ROOT = Path(__file__).parents[1]
NAME = "eight_schools-eight_schools_noncentered"
Row = dict[str, Any]


def centred(sigma: Tensor, y: Tensor) -> None:
    """Posteriordb's Eight Schools with θ drawn around μ: a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def noncentred(sigma: Tensor, y: Tensor) -> None:
    """The same posterior, with θ = μ + τ η."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def fit(model: Callable[..., Any], *args: Any, seed: int, **options: Any) -> tuple[Any, float]:
    """Draws function and seconds of a fit with the defaults, or with ``options``."""
    pyro.set_rng_seed(seed)
    guide = ImplicitGuide(model)
    result = AVBSVI(model, guide, seed=seed, progress=False, **options).run(*args)
    return guide, result.seconds


def fit_iaf(model: Callable[..., Any], *args: Any, seed: int) -> tuple[Any, float]:
    """The peer to beat: Pyro's AutoIAFNormal, four transforms, 4 000 steps of 64 particles."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    began = time.perf_counter()
    guide = AutoIAFNormal(model, hidden_dim=[64, 64], num_transforms=4)
    optim = pyro.optim.ClippedAdam({"lr": 2e-3, "lrd": 0.01 ** (1 / 4000)})
    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optim, loss=elbo)
    for _ in range(4000):
        svi.step(*args)
    return guide, time.perf_counter() - began


def draw(guide: Any, num_samples: int, *args: Any) -> dict[str, Tensor]:
    """``{site: [S, ...]}`` from a guide of ours or of Pyro's."""
    if isinstance(guide, ImplicitGuide):
        return guide.sample(num_samples)
    with torch.no_grad(), pyro.plate("draws", num_samples, dim=-2):
        sites = guide(*args)
    return {name: value.reshape(num_samples, -1).squeeze(-1) for name, value in sites.items()}


def flat(draws: dict[str, Tensor]) -> Tensor:
    """All sites side by side, ``[S, D]`` in float64."""
    return torch.cat([value.double().reshape(len(value), -1) for value in draws.values()], 1)


def methods(contrast: str | None) -> dict[str, Callable[..., tuple[Any, float]]]:
    """What is compared: the defaults and the IAF guide, or one contrast alone."""
    if contrast is None:
        return {"implicit": fit, "iaf": fit_iaf}
    return {contrast: partial(fit, contrast=contrast)}


def paper(seed: int, num_samples: int, contrast: str | None) -> list[Row]:
    """The paper's data against exact draws."""
    schools = eight_schools()
    exact = flat(schools.exact_draws(num_samples, generator=torch.Generator().manual_seed(10**6)))
    rows = []
    for method, run in methods(contrast).items():
        guide, seconds = run(schools.model, schools.sigma, schools.y, seed=seed)
        torch.manual_seed(seed)
        draws = draw(guide, num_samples, schools.sigma, schools.y)
        draws = {name: draws[name] for name in ("mu", "tau", "eta")}
        rows.append(
            {
                "posterior": "paper",
                "method": method,
                "seed": seed,
                "seconds": seconds,
                "kl_qp": knn_kl(flat(draws), exact),
                "kl_pq": knn_kl(exact, flat(draws)),
                "p_tau_positive": (draws["tau"] > 0).double().mean().item(),
            }
        )
    return rows


def posteriordb(
    name: str, seed: int, folder: Path, num_samples: int, contrast: str | None
) -> list[Row]:
    """One of the two forms of posteriordb's Eight Schools against its reference draws."""
    data = json.loads((folder / f"{NAME}.data.json").read_text())
    sigma, y = (torch.tensor(data[key], dtype=torch.get_default_dtype()) for key in ("sigma", "y"))
    file = np.load(folder / f"{NAME}.npz")
    columns = dict(
        zip(file["names"], torch.tensor(file["draws"], dtype=torch.float64).T, strict=True)
    )
    theta = torch.stack([columns[f"theta[{i}]"] for i in range(1, 9)], 1)
    reference = flat({"mu": columns["mu"], "tau": columns["tau"].log(), "theta": theta})
    reference = reference[
        torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))
    ]
    model = centred if name == "centred" else noncentred
    rows = []
    for method, run in methods(contrast).items():
        guide, seconds = run(model, sigma, y, seed=seed)
        torch.manual_seed(seed)
        draws = draw(guide, num_samples, sigma, y)
        theta = draws.get(
            "theta", draws["mu"][:, None] + draws["tau"][:, None] * draws.get("eta", 0)
        )
        found = flat({"mu": draws["mu"], "tau": draws["tau"].log(), "theta": theta})
        half = reference[:num_samples]
        rows.append(
            {
                "posterior": name,
                "method": method,
                "seed": seed,
                "seconds": seconds,
                "c2st": c2st(found, half),
                "mean_error": mean_error(found, reference),
                "sd_ratio": sd_ratio(found, reference),
                "kl_qp": knn_kl(whiten(found, reference), whiten(half, reference)),
                "kl_pq": knn_kl(whiten(half, reference), whiten(found, reference)),
            }
        )
    return rows


def floors(num_samples: int) -> Row:
    """The estimator's own error: exact draws against other exact draws."""
    schools = eight_schools()
    a, b = (
        flat(schools.exact_draws(num_samples, generator=torch.Generator().manual_seed(s)))
        for s in (1, 2)
    )
    return {"posterior": "paper", "method": "exact", "kl_qp": knn_kl(a, b), "kl_pq": knn_kl(b, a)}


def reference_folder() -> Path | None:
    """Where the reference draws are, if they are anywhere."""
    places = [ROOT.parent / "shared" / "data"]
    if "IMPLICITVI_DATA" in os.environ:
        places.insert(0, Path(os.environ["IMPLICITVI_DATA"]))
    found = [place / "posteriors" for place in places if (place / "posteriors").is_dir()]
    return found[0] if found else None


FIGURES = {
    "seconds": "seconds",
    "kl_qp": "KL(q‖p)",
    "kl_pq": "KL(p‖q)",
    "p_tau_positive": "P(τ > 0)",
    "c2st": "C2ST",
    "mean_error": "mean error (sd)",
}
POSTERIORS = {
    "paper": "the AVB paper's, two modes",
    "centred": "posteriordb's, centred (a funnel)",
    "noncentred": "posteriordb's, noncentred",
}


def table(result: Row) -> str:
    """The result as a Markdown table: medians over the seeds, with the range."""
    head = ["posterior", "method", "seeds", *FIGURES.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["posterior"], row["method"]), []).append(row)
    for (posterior, method), rows in groups.items():
        cells = [POSTERIORS[posterior], method, str(len(rows))]
        for key in FIGURES:
            values = sorted(row[key] for row in rows if key in row)
            digits = 1 if key == "seconds" else 3
            spread = f" ({values[0]:.{digits}f}–{values[-1]:.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.{digits}f}{spread}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--contrast", help="measure this contrast instead of the defaults")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "accuracy.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads cost more than they bring
    rows = [floors(20_000)]
    for seed in range(options.seeds):
        rows += paper(seed, 20_000, options.contrast)
        print(table({"rows": rows}), flush=True)
    folder = reference_folder()
    if folder is None:
        print(
            "posteriordb's Eight Schools left out: no reference draws in $IMPLICITVI_DATA/posteriors"
        )
    else:
        for seed in range(min(options.seeds, 3)):
            for name in ("centred", "noncentred"):
                rows += posteriordb(name, seed, folder, 5000, options.contrast)
                print(table({"rows": rows}), flush=True)
    packages = ("implicitvi", "torch", "pyro-ppl", "zuko", "scikit-learn")
    result = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
