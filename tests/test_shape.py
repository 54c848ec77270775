"""The package keeps its shape: few rooms on few floors, short statements, plain docstrings (tests/shape.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shape


@pytest.fixture(scope="module")
def whole() -> dict[str, shape.Measure]:
    """The measures of the package by name."""
    return {each.name: each for each in shape.measure(shape.Package(shape.PACKAGE))}


@pytest.mark.parametrize("name", shape.BOUNDS)
def test_no_bound_is_broken(name: str, whole: dict[str, shape.Measure]) -> None:
    each = whole[name]
    assert not each.is_broken, "\n".join([str(each), *each.offenders])


def test_every_bound_has_a_measure(whole: dict[str, shape.Measure]) -> None:
    assert set(shape.BOUNDS) <= set(whole)


def test_the_floors_have_every_room() -> None:
    assert sorted(room for rooms in shape.FLOORS for room in rooms) == shape.Package(shape.PACKAGE).rooms


def test_the_picture_shows_the_imports_of_today() -> None:
    drawn = shape.draw(shape.Package(shape.PACKAGE))
    assert shape.PICTURE.read_text(encoding="utf-8") == drawn, "run make shape"


# planted violations


Plant = Callable[[str, str], dict[str, shape.Measure]]


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    """A function that appends text to a file of a small package and measures the package."""
    package = tmp_path / "implicitvi"
    files = {
        "__init__": "from implicitvi.inference.fit import Fit\n",
        "errors": "class ShapeError(Exception):\n    pass\n",
        "rng": "def draw():\n    pass\n",
        "numerics/__init__": "",
        "numerics/gaussian": "from implicitvi.errors import ShapeError\n",
        "inference/__init__": "",
        "inference/fit": "from ..numerics import gaussian\n\n\nclass Fit:\n    pass\n",
        "inference/guide": "from . import fit\n",
    }
    for name, text in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Say something."""\n{text}')

    def measured(name: str, text: str) -> dict[str, shape.Measure]:
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
        return {each.name: each for each in shape.measure(shape.Package(package))}

    return measured


def broken(measures: dict[str, shape.Measure]) -> set[str]:
    return {name for name, each in measures.items() if each.is_broken}


def test_a_small_package_is_within_every_bound(plant: Plant) -> None:
    measures = plant("rng", "")
    assert broken(measures) == set()
    assert measures["rooms"].value == 5
    assert measures["floors"].note == "errors < numerics < inference < __init__"
    assert measures["arrows between rooms"].offenders == [
        "__init__ -> inference",
        "inference -> numerics",
        "numerics -> errors",
    ]


OPENERS = [
    ("def f():\n    '''What it does.'''\n", "f: What it does."),
    ("class C:\n    '''Where it is.'''\n", "C: Where it is."),
    ("class C:\n    def m(self):\n        '''\n        As it says.\n        '''\n", "m: As it says."),
    ("async def f():\n    '''Which of them.'''\n", "f: Which of them."),
    ("def f():\n    def g():\n        '''In place of others.'''\n", "g: In place of others."),
]


@pytest.mark.parametrize(("text", "offender"), OPENERS)
def test_a_forbidden_opener_is_caught(plant: Plant, text: str, offender: str) -> None:
    measures = plant("rng", text)
    assert broken(measures) == {"docstrings with a forbidden opener"}
    (only,) = measures["docstrings with a forbidden opener"].offenders
    assert only.startswith("implicitvi/rng.py:") and only.endswith(offender)


def test_a_forbidden_opener_of_a_module_is_caught(plant: Plant) -> None:
    measures = plant("numerics/types", '"""How to call things."""\n')
    assert measures["docstrings with a forbidden opener"].offenders == [
        "implicitvi/numerics/types.py:1 numerics.types: How to call things."
    ]


@pytest.mark.parametrize("said", ["Asks a question.", "Whatever.", "Return how many.", "``What``"])
def test_other_openers_are_allowed(plant: Plant, said: str) -> None:
    assert broken(plant("rng", f"def f():\n    '''{said}'''\n")) == set()


UPWARD = [
    ("rng", "import implicitvi.inference.fit\n", "rng imports inference.fit, which is not below it"),
    ("rng", "from implicitvi import Fit\n", "rng imports __init__, which is not below it"),
    ("rng", "from . import errors\n", "rng imports errors, which is not below it"),
    ("gadgets", "", "gadgets has no floor: add it to FLOORS in tests/shape.py, as low as its imports allow"),
]


@pytest.mark.parametrize(("name", "text", "offender"), UPWARD)
def test_an_upward_import_is_caught(plant: Plant, name: str, text: str, offender: str) -> None:
    measures = plant(name, text)
    assert "upward imports" in broken(measures)
    assert measures["upward imports"].offenders == [offender]


def test_a_circle_between_rooms_is_caught(plant: Plant) -> None:
    """The import is for type checkers only, within a function: it counts all the same."""
    text = "import typing\ndef f():\n    if typing.TYPE_CHECKING:\n        from ..inference.fit import Fit\n"
    measures = plant("numerics/gaussian", text)
    assert broken(measures) == {"upward imports", "circles between rooms", "circles between modules"}
    assert measures["circles between rooms"].offenders == ["inference, numerics"]
    assert measures["circles between modules"].offenders == ["inference.fit, numerics.gaussian"]


def test_a_circle_between_modules_of_one_room_is_caught(plant: Plant) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from implicitvi.inference import guide\n"
    measures = plant("inference/fit", text)
    assert broken(measures) == {"circles between modules"}
    assert measures["circles between modules"].offenders == ["inference.fit, inference.guide"]


def test_two_circles_are_two() -> None:
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}, "e": {"a"}}
    assert shape.circles(graph) == ["a, b", "c, d"]
    assert shape.longest_path(graph)[-1] == "e" and len(shape.longest_path(graph)) == 3


def test_rooms_floors_and_arrows_are_counted(plant: Plant) -> None:
    """A chain of imports through ten more rooms adds ten of each."""
    measures = {}
    for i in range(10):
        measures = plant(f"room{i}", f"from implicitvi import {f'room{i - 1}' if i else 'inference'}\n")
    values = {name: measures[name].value for name in ("rooms", "floors", "arrows between rooms")}
    assert values == {"rooms": 15, "floors": 13, "arrows between rooms": 13}
    assert {"floors", "upward imports"} == broken(measures)


def test_too_many_rooms_and_arrows_are_caught(plant: Plant) -> None:
    measures = {}
    for i in range(13):
        measures = plant(f"room{i}", "from implicitvi import errors, numerics, inference, rng\n")
    assert {"rooms", "arrows between rooms"} <= broken(measures)


def test_too_many_lines_are_caught(plant: Plant) -> None:
    measures = plant("rng", "\n" * 19_601)
    assert broken(measures) == {"lines"}


def test_a_long_class_is_caught(plant: Plant) -> None:
    within = plant("rng", "class C:\n" + "".join(f"    x{i} = {i}\n" for i in range(299)))
    assert within["longest class"].value == 300 and broken(within) == set()
    measures = plant("rng", "    y = 0\n")
    assert broken(measures) == {"longest class"}
    assert measures["longest class"].offenders == ["implicitvi/rng.py:4 C: 301 lines"]


def test_a_function_with_many_parameters_is_caught(plant: Plant) -> None:
    ten = "class C:\n    def f(self, a, b, /, c, d, *args, e, f, g, h, **kwargs):\n        pass\n"
    assert broken(plant("rng", ten)) == set()
    measures = plant("rng", ten.replace("class C", "class D").replace("h,", "h, i,"))
    assert broken(measures) == {"functions with too many parameters"}
    assert measures["functions with too many parameters"].offenders == ["implicitvi/rng.py:8 f: 11 parameters"]


def test_a_long_raise_is_caught(plant: Plant) -> None:
    text = "def f():\n    raise ValueError(\n        'no'\n    )\n"
    measures = plant("rng", text)
    assert broken(measures) == {"lines in raise statements"}
    assert measures["lines in raise statements"].offenders == ["implicitvi/rng.py:5: 3 lines"]
    lines = measures["lines"].value
    assert measures["lines in raise statements"].value == pytest.approx(100 * 3 / lines)
    assert broken(plant("errors", "".join(f"x{i} = {i}\n" for i in range(100)))) == set()


def test_repeated_lines_are_caught(plant: Plant) -> None:
    """Eight lines twice, however indented, with a comment and an import between them."""
    lines = [f"x{i} = {i}" for i in range(8)]
    assert plant("rng", "\n".join(lines))["repeated lines"].value == 0
    again = ["if True:", *(f"    {line}" for line in lines)]
    again.insert(4, "    # why\n\n    import os")
    measures = plant("errors", "\n".join(again))
    assert broken(measures) == {"repeated lines"}
    assert measures["repeated lines"].offenders == ["implicitvi/errors.py:5", "implicitvi/rng.py:4"]
    total = 8 + 2 + (2 + 8) + (2 + 1 + 8)  # eight docstrings, a class elsewhere, the two modules
    assert measures["repeated lines"].value == pytest.approx(100 * 16 / total)


def test_lengths_of_functions_leave_out_docstrings(plant: Plant) -> None:
    text = "".join(f"def f{i}():\n    '''Do.\n\n    More.\n    '''\n    return {i}\n\n\n" for i in range(9))
    measures = plant("numerics/types", text + "def g():\n" + "    x = 1\n" * 30)
    assert measures["median length of functions"].value == 2
    assert measures["95th percentile of functions"].value == 31
    assert measures["95th percentile of functions"].offenders[0] == "implicitvi/numerics/types.py:73 g: 31 lines"


# picture and program


def test_the_picture_leaves_out_arrows_that_follow_from_others() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert list(shape.needed(graph)) == [("a", "b"), ("b", "c")]


def test_the_program_fails_where_a_bound_is_broken(plant: Plant, tmp_path: Path) -> None:
    plant("rng", "")
    code, out = program(tmp_path, "--picture", str(tmp_path / "a.svg"))
    assert code == 0 and "BROKEN" not in out
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("<rect") == 5 and drawn.count('marker-end="url(#head)"') == 3
    plant("rng", "def f():\n    '''What it does.'''\n")
    code, out = program(tmp_path, "--details")
    assert code == 1 and out.count("BROKEN") == 1 and "    implicitvi/rng.py:4 f: What it does.\n" in out


def program(folder: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, shape.__file__, "--package", str(folder / "implicitvi"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert not result.stderr
    return result.returncode, result.stdout
