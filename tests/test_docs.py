"""The documentation runs as written, links to what exists, and has all that is public.

Code blocks run page by page, in order, in one namespace, as a reader would paste them; only their sizes are cut down
(`tiny`). ``DOCS_SIZES=full pytest tests/test_docs.py -s -k NAME`` runs a page at the sizes that it shows, and prints
what it prints.
"""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import pytest

import implicitvi
from implicitvi.__main__ import main, read_entries
from implicitvi.avb.ratios import RatioLoss
from implicitvi.errors import ModelError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FAQ = ROOT / "implicitvi" / "faq.md"  # docs/howto/faq.md includes it
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", FAQ, *DOCS.rglob("*.md")]
    if not {"_build", "gallery", "api"} & set(path.relative_to(ROOT).parts[:-1])
)
MODULES = [
    import_module(info.name)
    for info in pkgutil.walk_packages(implicitvi.__path__, "implicitvi.")
    # a function hides the first; the second is a program
    if info.name not in ("implicitvi.datasets.eight_schools", "implicitvi.__main__")
] + [implicitvi]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[str]:
    """The Python of a page, block by block."""
    fenced = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    return [block for block in fenced if ">>>" not in block]


CODE = [path for path in PAGES if blocks(path)]


# code


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes cut down to what shows that a page runs: steps, epochs, draws of NUTS, intermediate distributions."""
    if os.environ.get("DOCS_SIZES") == "full":
        yield
        return
    from pyro.infer import MCMC

    from implicitvi import AVB_ELBO, AVBSVI
    from implicitvi.vae.model import LatentModel

    small = {"num_steps": 4, "warm_start": 4, "num_particles": 64}
    cut(monkeypatch, AVBSVI, "__init__", spare=64, **small)
    cut(monkeypatch, AVB_ELBO, "__init__", spare=64, **small)
    cut(monkeypatch, LatentModel, "fit", epochs=1)
    cut(monkeypatch, MCMC, "__init__", num_samples=40, warmup_steps=10)
    yield


def cut(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, *, spare: int = 0, **limits: int) -> None:
    """Hold arguments of a method below limits, or ``spare`` where that is more, those left at their defaults too."""
    whole = getattr(owner, method)
    parameters = inspect.signature(whole)

    def smaller(*args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, limit in limits.items():
            given = bound.arguments[name]
            if given is None or isinstance(given, tuple) or given > max(limit, spare):
                bound.arguments[name] = limit
        return whole(*bound.args, **bound.kwargs)

    monkeypatch.setattr(owner, method, smaller)


def shortened(code: str) -> str:
    """The code with loops of at most five rounds, unless it is to run at its own size."""
    if os.environ.get("DOCS_SIZES") == "full":
        return code
    return re.sub(r"in range\((\d[\d_]*)\):", lambda n: f"in range({min(int(n[1]), 5)}):", code)


@pytest.mark.slow
@pytest.mark.uses_param_store
@pytest.mark.filterwarnings("ignore:4 steps with:UserWarning")  # too few for minibatches, they are
@pytest.mark.filterwarnings("ignore:. fits DISAGREE:UserWarning")  # after so few, they do
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")  # of such fits, large
@pytest.mark.filterwarnings("ignore:a few draws have most of the weight:UserWarning")  # of such fits
@pytest.mark.filterwarnings("ignore::FutureWarning:arviz")
@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_every_code_block_runs(path: Path, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    import matplotlib
    import matplotlib.pyplot as plt
    import numpy as np

    matplotlib.use("Agg")
    generators = random.getstate(), np.random.get_state()  # pages may seed what is the reader's
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")  # dataclasses look themselves up in their module
    monkeypatch.setitem(sys.modules, "page", module)
    source = path.read_text(encoding="utf-8")
    try:
        for block in blocks(path):
            line = source[: source.index(block)].count("\n")
            code = compile("\n" * line + shortened(block), str(path), "exec")
            exec(code, vars(module))
    finally:
        plt.close("all")
        random.setstate(generators[0])
        np.random.set_state(generators[1])


def test_extensions_are_short() -> None:
    """The promise of the page: a new part is under 40 lines, its imports and its use included."""
    page = DOCS / "extending.md"
    lengths = [len(block.splitlines()) for block in blocks(page)]
    assert len(lengths) == 5 and max(lengths) < 40


# tables


DEFAULTS = {
    "AVBSVI": implicitvi.AVBSVI.__init__,
    "ImplicitGuide": implicitvi.ImplicitGuide.__init__,
    "LatentModel.fit": import_module("implicitvi.vae.model").LatentModel.fit,
}


@pytest.mark.parametrize("title", DEFAULTS)
def test_the_defaults_are_those_of_the_code(title: str) -> None:
    page = (DOCS / "reference" / "defaults.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert section is not None
    shown = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \| .{8,} \|$", section[1], re.M))
    options = inspect.signature(DEFAULTS[title]).parameters.values()
    assert shown == {o.name: default_of(o) for o in options if o.default is not o.empty}


def default_of(option: inspect.Parameter) -> str:
    value = option.default
    return value.__name__ if callable(value) else repr(value)


def test_every_table_of_results_is_a_page() -> None:
    """A table that a command writes has a title, and the command, in the documentation."""
    conf = (DOCS / "conf.py").read_text(encoding="utf-8")
    for path in (DOCS / "results").glob("*.md"):
        assert f'"{path.stem}": (' in conf, f"give {path.name} a title in RESULTS of docs/conf.py"


def test_what_builds_the_documentation_has_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    for requirement in project["optional-dependencies"]["docs"]:
        name = re.match(r"[\w-]+", requirement)
        assert name is not None and f"\n{name[0]}==" in pinned


# links


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links of a page, up to what is made at build: the gallery and the reference."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        link, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        if not link:
            assert anchor in anchors(path), f"{target} in {path.name}"
            continue
        there = (path.parent / link).resolve()
        if there.is_relative_to(DOCS / "gallery"):
            there = ROOT / "examples" / f"{there.stem.replace('index', 'GALLERY_HEADER')}"
            assert there.with_suffix(".py").exists() or there.with_suffix(".rst").exists(), target
            continue
        assert there.exists(), f"{target} in {path.name}"
        if anchor:
            assert anchor in anchors(there), f"{target} in {path.name}"


def anchors(path: Path) -> set[str]:
    """Headings of a page as links write them, those of included pages too, and full names of all that is public."""
    text = path.read_text(encoding="utf-8")
    for included in re.findall(r"^```{include} (\S+)$", text, re.M):
        text += (path.parent / included).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | {full for full, _ in public()}


def faq_named() -> set[str]:
    """Entries of the FAQ that errors point to: a literal ``faq`` of every class, and of every call elsewhere."""
    classes = vars(import_module("implicitvi.errors")).values()
    found = {each.faq for each in classes if hasattr(each, "faq")}
    for path in set((ROOT / "implicitvi").rglob("*.py")) - {ROOT / "implicitvi" / "errors.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found |= {ast.literal_eval(k.value) for k in node.keywords if k.arg == "faq"}
    return found - {"", None}


def test_errors_point_to_entries_of_the_faq_that_exist() -> None:
    assert len(faq_named()) > 8
    assert faq_named() <= anchors(FAQ) & set(read_entries())


def test_the_documentation_includes_the_faq_of_the_package() -> None:
    """The file is data of the package, so that an installed one can print it; links to the page find its entries."""
    assert resources.files("implicitvi").joinpath("faq.md").read_text(encoding="utf-8") == FAQ.read_text(
        encoding="utf-8"
    )
    assert set(read_entries()) <= anchors(DOCS / "howto" / "faq.md")
    links = re.findall(r"\]\((?!#|https:)(\S+?)\)", FAQ.read_text(encoding="utf-8"))
    assert links and all(link.startswith("../docs/") for link in links)  # `relative-docs` rewrites these


@pytest.mark.parametrize("anchor", read_entries())
def test_every_entry_of_the_faq_is_printed(anchor: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["faq", anchor])
    heading, line, blank, *body = capsys.readouterr().out.splitlines()
    assert heading == read_entries()[anchor].heading and line == "=" * len(heading) and not blank
    assert len("".join(body)) > 20 and not re.search(r"^```|\]\(|^#", "\n".join(body), re.M)
    assert all(len(each) <= 100 or each.startswith("    ") for each in body)


def test_the_faq_lists_its_entries(capsys: pytest.CaptureFixture[str]) -> None:
    main(["faq"])
    listed = [row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines()[2:]]
    assert listed == [[anchor, entry.heading] for anchor, entry in read_entries().items()]


def test_an_unknown_entry_of_the_faq_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["faq", "a-mode-is-misssing"])
    assert ended.value.code == 2
    assert "Did you mean 'a-mode-is-missing'?" in capsys.readouterr().err


def test_the_faq_is_printed_from_the_command_line() -> None:
    command = [sys.executable, "-m", "implicitvi", "faq", "it-is-slow"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("It is slow\n==========\n"), result.stderr


def test_a_refused_model_says_where_to_read_on() -> None:
    """The pointer is on a line of its own, so that who shows the first line only has a whole sentence."""

    def coin() -> None:
        pyro.sample("coin", dist.Bernoulli(0.5))

    with pytest.raises(ModelError) as caught:
        implicitvi.ImplicitGuide(coin).setup()
    said, more = str(caught.value).splitlines()
    assert said.endswith("config_enumerate.")
    assert caught.value.faq == "a-discrete-latent-is-refused"
    assert more == f"More: python -m implicitvi faq {caught.value.faq}"


# docstrings


def public() -> list[tuple[str, Any]]:
    """Public classes and functions where they are defined, and what public classes define."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{module.__name__}.{name}"] = value
                if inspect.isclass(value):
                    found |= {
                        f"{module.__name__}.{name}.{each}": member
                        for each, member in vars(value).items()
                        if not each.startswith("_") and documented_here(value, each, member)
                    }
    return sorted(found.items())


def documented_here(owner: type, name: str, member: Any) -> bool:
    """Whether a member is a function or property that no base class has documented already."""
    function = getattr(member, "__func__", getattr(member, "fget", member))
    said = [*owner.__mro__[1:], RatioLoss]  # a protocol: its members do not inherit from it
    inherits = any(hasattr(base, name) for base in said) and owner is not RatioLoss
    is_field = name in vars(owner).get("__annotations__", {})
    return inspect.isfunction(function) and not inherits and not is_field


def text_of(value: Any) -> str:
    function = getattr(value, "fget", value)
    return inspect.cleandoc(getattr(function, "__doc__", None) or "")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_is_public_is_documented(module: ModuleType) -> None:
    """A sentence for everything; arguments by name wherever there is a list of them; shapes wherever tensors go in."""
    missing = []
    for name, value in public():
        if not name.startswith(module.__name__ + ".") or name.count(".") - module.__name__.count(".") > 2:
            continue
        text = text_of(value)
        if not re.match(r"\S.{8,}", text):
            missing.append(f"{name}: no docstring")
        missing += [f"{name}: nothing of {each}" for each in undocumented(value, text)]
    assert not missing, "\n".join(missing)


def undocumented(value: Any, text: str) -> list[str]:
    """Arguments that a list of arguments leaves out, and tensors without a shape."""
    function = vars(value).get("__init__") if inspect.isclass(value) else value
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return []
    arguments = [p for p in inspect.signature(function).parameters.values()]
    named = [p for p in arguments if p.name not in ("self", "cls")]
    missing = []
    if "Args:" in text:
        listed = text.partition("Args:")[2]
        missing = [p.name for p in named if not re.search(rf"\b{p.name}:", listed)]
    tensors = [p.name for p in named if p.annotation in ("Tensor", "Draws") and p.name != "like"]
    if tensors and not inspect.isclass(value) and not re.search(r"\[.*\]|scalar|shape", text):
        missing.append(f"the shape of {', '.join(tensors)}")
    return missing


def test_the_reference_has_every_module() -> None:
    """The build fails where a class or function is missing; this says so without one."""
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    missing = [m.__name__ for m in MODULES if not re.search(rf"^   {re.escape(m.__name__)}$", page, re.M)]
    assert not missing, "list them in docs/reference/api.md"
