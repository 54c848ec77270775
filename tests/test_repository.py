"""The files around the package say what is true."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import implicitvi

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "implicitvi").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
ROOMS = sorted(p for p in (ROOT / "implicitvi").rglob("*.py") if p.name != "__init__.py")


def test_changelog_has_a_section_for_what_is_not_released() -> None:
    assert re.search(r"^## [\d.]+ \(unreleased\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_make_has_every_target_that_the_documents_name() -> None:
    targets = set(re.findall(r"^([a-z.-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    readme = commands(ROOT / "README.md")
    assert {"demo", "test"} <= readme
    assert (readme | commands(ROOT / "CONTRIBUTING.md")) <= targets


def commands(path: Path) -> set[str]:
    """Targets of ``make`` in a document's code: inline, fenced or indented."""
    pattern = r"```.*?```|`[^`\n]+`|^    .*?$"
    code = re.findall(pattern, path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return {target for piece in code for target in re.findall(r"\bmake ([a-z.-]+)", piece)}


def test_readme_shows_a_measured_table() -> None:
    """Every figure of the README comes from the accuracy suite."""
    import accuracy

    shown = accuracy.brief(json.loads(accuracy.OUTPUT.read_text(encoding="utf-8")))
    assert accuracy.OUTPUT.with_name("accuracy-brief.md").read_text(encoding="utf-8") == shown
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_suite_shows_what_was_measured() -> None:
    """Its table comes from the results file, and that from `make accuracy`."""
    import accuracy

    shown = accuracy.table(json.loads(accuracy.OUTPUT.read_text(encoding="utf-8")))
    assert accuracy.OUTPUT.with_suffix(".md").read_text(encoding="utf-8") == shown
    assert accuracy.PICTURE.exists()


def test_the_exact_posteriors_show_what_was_measured() -> None:
    """Their table comes from the results file, and that from `make conjugate`."""
    import conjugate

    shown = conjugate.table(json.loads(conjugate.OUTPUT.read_text(encoding="utf-8")))
    assert conjugate.OUTPUT.with_suffix(".md").read_text(encoding="utf-8") == shown


def test_refinement_shows_what_was_measured() -> None:
    """Its table comes from the results file, that from `make refinement`; each way lowers something."""
    import refinement

    result = json.loads(refinement.OUTPUT.read_text(encoding="utf-8"))
    shown = refinement.table(result)
    assert refinement.OUTPUT.with_suffix(".md").read_text(encoding="utf-8") == shown
    for how in refinement.REFINED:
        (counts,) = re.findall(rf"^- {how}: .* lowered (\d+), raised (\d+);", shown, re.MULTILINE)
        assert int(counts[0]) > 0 and int(counts[1]) == 0


def test_the_benchmark_shows_what_was_measured() -> None:
    """Its tables come from the results file, and that from `make bench`."""
    import bench

    shown = bench.table(json.loads(bench.OUTPUT.read_text(encoding="utf-8")))
    assert bench.OUTPUT.with_suffix(".md").read_text(encoding="utf-8") == shown
    assert bench.PICTURE.exists()


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert implicitvi.__version__ == project["version"]


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in wanted} <= pinned  # type: ignore[index]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_architecture_document_shows_every_module(path: Path) -> None:
    shown = re.findall(r"\w+\.py", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert path.name in shown, f"give {path.name} its line in docs/architecture.md"


@pytest.mark.parametrize("banned", ["/work/", "/tmp/", "/home/", "pickle.load", "Unpickler", "weights_only=False"])
def test_code_has_no_machine_paths_and_reads_no_pickles(banned: str) -> None:
    assert SHIPPED
    assert [str(path.relative_to(ROOT)) for path in SHIPPED if banned in path.read_text(encoding="utf-8")] == []
