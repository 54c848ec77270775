"""Measure the shape of the package: rooms and imports between them, repetition, lengths, errors and docstrings.

``make shape`` prints the measures beside their bounds and draws the architecture; tests/test_shape.py holds the package
to the bounds. A room is a module or folder at the top of the package. Every import counts, in functions and for type
checkers too. A signature that a decorator makes is not in the source, so only the parameters in the source count.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "implicitvi"
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

# The rooms from the lowest floor to the highest, from left to right as in the picture. A room imports from lower floors
# and from itself only.
FLOORS = (
    ("errors", "distributed", "nn", "rng"),
    ("numerics", "training", "datasets"),
    ("avb", "pyro_model", "metrics"),
    ("diagnostics",),
    ("vae", "inference", "plots", "export"),
    ("__main__", "__init__"),
)
PARAMETERS = 10  # at most, of a function; self and cls are not counted
WINDOW = 8  # lines that count as repeated where they occur twice
OPENERS = ("What", "Where", "Whether", "Which", "How", "As", "Who", "When", "In place")  # no docstring starts with one
# The largest allowed value of each measure.
BOUNDS = {
    "lines": 19_600,  # of these about 2,500 check arguments, calls, files and fits that failed without a word
    "rooms": 17,
    "floors": 6,
    "arrows between rooms": 50,
    "upward imports": 0,
    "circles between rooms": 0,
    "circles between modules": 0,
    "repeated lines": 2.0,
    "longest class": 300,
    "functions with too many parameters": 0,
    "lines in raise statements": 3.0,
    "docstrings with a forbidden opener": 0,
}


@dataclass(frozen=True)
class Measure:
    """A number about the package.

    Attributes:
        name: The name, a key of `BOUNDS` where there is a bound.
        value: The number.
        unit: Its unit, printed after it.
        note: A remark, printed on the same line.
        offenders: Places to look at, the worst first.
    """

    name: str
    value: float
    unit: str = ""
    note: str = ""
    offenders: Sequence[str] = ()

    @property
    def is_broken(self) -> bool:
        """Return True where the value is above its bound."""
        return self.value > BOUNDS.get(self.name, float("inf"))

    def __str__(self) -> str:
        value = f"{self.value:,.1f}" if isinstance(self.value, float) else f"{self.value:,}"
        bound = f"at most {BOUNDS[self.name]:,g}" if self.name in BOUNDS else ""
        mark = "BROKEN" if self.is_broken else ""
        return f"{self.name:36}{f'{value} {self.unit}'.strip():>10}  {bound:16}{mark:8}{self.note}".rstrip()


@dataclass(frozen=True)
class Module:
    """A file of the package.

    Attributes:
        name: Dotted name without the package's; ``__init__`` for the package itself.
        path: The file.
        place: Path from the folder that has the package, for messages.
    """

    name: str
    path: Path
    place: str

    @cached_property
    def text(self) -> str:
        """The source."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    def find(self, *kinds: type[ast.AST]) -> Iterator[Any]:
        """Yield all nodes of some kinds."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


@dataclass(frozen=True)
class Package:
    """The modules of a package and their imports."""

    folder: Path

    @cached_property
    def modules(self) -> dict[str, Module]:
        """All modules by name."""
        found = {}
        for path in sorted(self.folder.rglob("*.py")):
            parts = path.relative_to(self.folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
            found[name] = Module(name, path, path.relative_to(self.folder.parent).as_posix())
        return found

    @cached_property
    def rooms(self) -> list[str]:
        """Names of the rooms."""
        return sorted(set(map(room_of, self.modules)))

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Modules that each module imports; ``__init__`` is the package itself."""
        return {name: set(self.imported(module)) - {name} for name, module in self.modules.items()}

    @cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Other rooms that each room imports."""
        arrows: dict[str, set[str]] = {room: set() for room in self.rooms}
        for name, targets in self.imports.items():
            arrows[room_of(name)] |= {room_of(target) for target in targets} - {room_of(name)}
        return arrows

    def imported(self, module: Module) -> Iterator[str]:
        """Yield the modules of the package that a module imports, wherever in the file."""
        parts = [] if module.name == "__init__" else module.name.split(".")
        inside = parts if module.path.name == "__init__.py" else parts[:-1]
        for node in module.find(ast.Import, ast.ImportFrom):
            if isinstance(node, ast.Import):
                targets = [alias.name.split(".") for alias in node.names]
                yield from (self.known(target[1:]) for target in targets if target[0] == self.folder.name)
                continue
            source = node.module.split(".") if node.module else []
            if node.level:
                source = [*inside[: len(inside) - node.level + 1], *source]
            elif source[0] == self.folder.name:
                source = source[1:]
            else:
                continue
            yield from (self.known([*source, alias.name]) for alias in node.names)

    def known(self, parts: list[str]) -> str:
        """Return the module that has a name: the name itself, or the module in which it is defined."""
        while parts and ".".join(parts) not in self.modules:
            parts = parts[:-1]
        return ".".join(parts) or "__init__"


def room_of(name: str) -> str:
    """Return the room of a module."""
    return name.split(".")[0]


# graphs


def reachable(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return all nodes that arrows lead to from each node; a node on a circle reaches itself."""
    reach = {}
    for node in graph:
        found: set[str] = set()
        waiting = list(graph[node])
        while waiting:
            other = waiting.pop()
            if other not in found:
                found.add(other)
                waiting += graph.get(other, ())
        reach[node] = found
    return reach


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the sets of nodes that reach one another, as text."""
    reach = reachable(graph)
    on_circles = [node for node in graph if node in reach[node]]
    found = {frozenset(other for other in reach[node] if node in reach.get(other, ())) for node in on_circles}
    return sorted(", ".join(sorted(circle)) for circle in found)


def longest_path(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the longest path along arrows, from its end to its start; a circle counts as one node."""
    reach = reachable(graph)
    paths: dict[str, list[str]] = {}
    for node in sorted(graph, key=lambda each: len(reach[each] | {each})):
        below = [paths[other] for other in sorted(reach[node]) if node not in reach.get(other, ()) and other in paths]
        paths[node] = [*max(below, key=len, default=[]), node]
    return max(paths.values(), key=len, default=[])


def upward(package: Package) -> list[str]:
    """Return the imports that do not go to a lower floor, and the rooms that have no floor; a sentence each."""
    level = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    wrong = [
        f"{room} has no floor: add it to FLOORS in tests/shape.py, as low as its imports allow"
        for room in package.rooms
        if room not in level
    ]
    for name, targets in package.imports.items():
        for target in sorted(targets):
            here, there = level.get(room_of(name)), level.get(room_of(target))
            if room_of(name) != room_of(target) and here is not None and there is not None and there >= here:
                wrong.append(f"{name} imports {target}, which is not below it")
    return wrong


# lines


def repeated(package: Package) -> Measure:
    """Measure the lines in windows that occur more than once; blank lines, comments and imports are left out."""
    windows: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    numbers: dict[str, list[int]] = {}
    for module in package.modules.values():
        stripped = [(number, line.strip()) for number, line in enumerate(module.text.splitlines(), 1)]
        kept = [pair for pair in stripped if pair[1] and not pair[1].startswith(("#", "import ", "from "))]
        numbers[module.place] = [number for number, _ in kept]
        for start in range(len(kept) - WINDOW + 1):
            windows[tuple(line for _, line in kept[start : start + WINDOW])].append((module.place, start))
    twice = {
        (place, start + offset)
        for places in windows.values()
        if len(places) > 1
        for place, start in places
        for offset in range(WINDOW)
    }
    starts = sorted(pair for pair in twice if (pair[0], pair[1] - 1) not in twice)
    total = sum(map(len, numbers.values()))
    offenders = [f"{place}:{numbers[place][index]}" for place, index in starts]
    return Measure("repeated lines", 100 * len(twice) / max(total, 1), "%", offenders=offenders)


def length(node: ast.stmt) -> int:
    """Return the number of lines of a statement, decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def function_lengths(package: Package) -> list[tuple[int, str]]:
    """Return lines without docstring and place of every function, the shortest first."""
    found = []
    for module in package.modules.values():
        for node in module.find(ast.FunctionDef, ast.AsyncFunctionDef):
            said = ast.get_docstring(node, clean=False)
            lines = length(node) - (said.count("\n") + 1 if said else 0)
            found.append((lines, f"{module.place}:{node.lineno} {node.name}: {lines} lines"))
    return sorted(found)


def longest_class(package: Package) -> Measure:
    """Measure the lines of the longest class."""
    found = sorted(
        ((length(node), f"{module.place}:{node.lineno} {node.name}: {length(node)} lines"))
        for module in package.modules.values()
        for node in module.find(ast.ClassDef)
    )
    long = [place for lines, place in reversed(found) if lines > BOUNDS["longest class"]]
    return Measure("longest class", found[-1][0] if found else 0, note=found[-1][1] if found else "", offenders=long)


def parameters(package: Package) -> Measure:
    """Measure how many functions have too many parameters."""
    found = []
    for module in package.modules.values():
        for node in module.find(ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            count = sum(each is not None and each.arg not in ("self", "cls") for each in every)
            if count > PARAMETERS:
                name = getattr(node, "name", "lambda")
                found.append((count, f"{module.place}:{node.lineno} {name}: {count} parameters"))
    offenders = [place for _, place in sorted(found, reverse=True)]
    return Measure(
        "functions with too many parameters", len(found), note=f"more than {PARAMETERS}", offenders=offenders
    )


def raises(package: Package) -> Measure:
    """Measure the share of the lines that ``raise`` statements take."""
    found = [
        (length(node), f"{module.place}:{node.lineno}: {length(node)} lines")
        for module in package.modules.values()
        for node in module.find(ast.Raise)
    ]
    lines = sum(each for each, _ in found)
    long = [place for each, place in sorted(found, reverse=True) if each > 2]
    note = f"{len(found)} statements of {lines / max(len(found), 1):.1f} lines"
    return Measure("lines in raise statements", 100 * lines / max(total_lines(package), 1), "%", note, long)


def total_lines(package: Package) -> int:
    """Return the number of lines of all files."""
    return sum(module.text.count("\n") for module in package.modules.values())


def openers(package: Package) -> Measure:
    """Measure how many docstrings of modules, classes and functions start with a forbidden word."""
    counts: Counter[str] = Counter()
    offenders, total = [], 0
    for module in package.modules.values():
        for node in module.find(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            total += said is not None
            word = re.match(rf"({'|'.join(OPENERS)})\b", said or "")
            if word is not None:
                counts[word[0]] += 1
                where = f"{module.place}:{getattr(node, 'lineno', 1)} {getattr(node, 'name', module.name)}"
                offenders.append(f"{where}: {(said or '').splitlines()[0]}")
    shares = ", ".join(f"{word} {100 * counts[word] / max(total, 1):.1f} %" for word in OPENERS if counts[word])
    return Measure("docstrings with a forbidden opener", len(offenders), note=shares, offenders=offenders)


def measure(package: Package) -> list[Measure]:
    """Return all measures of a package."""
    lengths = function_lengths(package) or [(0, "")]
    path = longest_path(package.arrows)
    arrows = [f"{room} -> {target}" for room, targets in sorted(package.arrows.items()) for target in sorted(targets)]
    wrong, rounds = upward(package), {"rooms": circles(package.arrows), "modules": circles(package.imports)}
    longest = [place for _, place in lengths[::-1][:10]]
    return [
        Measure("lines", total_lines(package)),
        Measure("rooms", len(package.rooms), note=" ".join(package.rooms)),
        Measure("floors", len(path), note=" < ".join(path)),
        Measure("arrows between rooms", len(arrows), offenders=arrows),
        Measure("upward imports", len(wrong), offenders=wrong),
        *(Measure(f"circles between {of}", len(found), offenders=found) for of, found in rounds.items()),
        repeated(package),
        Measure("median length of functions", int(statistics.median(lines for lines, _ in lengths))),
        Measure("95th percentile of functions", lengths[int(0.95 * len(lengths))][0], offenders=longest),
        longest_class(package),
        parameters(package),
        raises(package),
        openers(package),
    ]


# picture

WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, MARGIN = 960, 200, 90, 142, 12
# Boxes are filled, and the grey of everything else is legible on a light and on a dark page.
STYLE = """\
text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif; text-anchor: middle }
rect { fill: #f4f7fb; stroke: #5b7fa6; stroke-width: 1.5 }
path { fill: none; stroke: #7d8fa3; stroke-width: 1.6 }
marker path { fill: #7d8fa3; stroke: none }
.name { font-size: 16px; font-weight: 600; fill: #12304f }
.line { font-size: 12px; fill: #33485e }
.caption { font-size: 12.5px; fill: #7d8fa3 }"""


def needed(graph: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yield the arrows that do not follow from others: ``a -> c`` is left out beside ``a -> b -> c``."""
    reach = reachable(graph)
    for node, targets in sorted(graph.items()):
        for target in sorted(targets):
            if not any(target in reach[other] for other in targets - {target}):
                yield node, target


Point = tuple[float, float]


def draw(package: Package) -> str:
    """Return the rooms on their floors, and the imports between them, as SVG."""
    floors = [[room for room in rooms if room in package.rooms] for rooms in reversed(FLOORS)]
    height = len(floors) * FLOOR_HEIGHT - (FLOOR_HEIGHT - BOX_HEIGHT) + 2 * MARGIN + 30
    corners = {
        room: (left(rooms, i), MARGIN + floor * FLOOR_HEIGHT)
        for floor, rooms in enumerate(floors)
        for i, room in enumerate(rooms)
    }
    name = package.folder.name
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
    caption = "An arrow points to a room that is imported. Arrows that follow from others are left out."
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<title>The rooms of {name} and the imports between them</title>",
        f"<style>\n{STYLE}\n</style>",
        f'<defs>{head}<path d="M0 0L8 4L0 8z"/></marker></defs>',
        *(curve(points) for points in routes(package, floors, corners)),
        *(box(package, room, *corner) for room, corner in corners.items()),
        f'<text class="caption" x="{WIDTH // 2}" y="{height - MARGIN}">{caption}</text>',
    ]
    return "\n".join([*lines, "</svg>\n"])


def left(rooms: Sequence[str], i: int) -> float:
    """Return the left edge of a box; ``i = len(rooms)`` is the box that would stand behind the last one."""
    gap = (WIDTH - len(rooms) * BOX_WIDTH) / (len(rooms) + 1)
    return gap + i * (gap + BOX_WIDTH)


def routes(package: Package, floors: list[list[str]], corners: Mapping[str, Point]) -> Iterator[list[Point]]:
    """Yield the points of every arrow: it leaves a box below, passes floors between boxes and ends on top of a box."""
    arrows = [
        (a, b) for a, b in needed(package.arrows) if a in corners and b in corners and corners[a][1] < corners[b][1]
    ]
    used: Counter[Point] = Counter()
    for room, target in sorted(arrows, key=lambda ends: corners[ends[1]][1] - corners[ends[0]][1]):
        leaving = sorted((b for a, b in arrows if a == room), key=lambda other: corners[other])
        coming = sorted((a for a, b in arrows if b == target), key=lambda other: corners[other])
        start = corners[room][0] + BOX_WIDTH * (leaving.index(target) + 1) / (len(leaving) + 1)
        end = corners[target][0] + BOX_WIDTH * (coming.index(room) + 1) / (len(coming) + 1)
        points = [(start, corners[room][1] + BOX_HEIGHT)]
        for rooms in floors:
            top = corners[rooms[0]][1] if rooms else 0
            if corners[room][1] < top < corners[target][1]:
                share = (top - corners[room][1]) / (corners[target][1] - corners[room][1])
                gap = left(rooms, 0)
                middles = [left(rooms, i) - gap / 2 for i in range(len(rooms) + 1)]
                middle = min(middles, key=lambda x: abs(x - start - share * (end - start)))
                lane = used[middle, top]
                used[middle, top] += 1
                x = middle + 9 * (lane + 1) // 2 * (-1) ** lane
                points += [(x, top), (x, top + BOX_HEIGHT)]
        yield [*points, (end, corners[target][1])]


def curve(points: list[Point]) -> str:
    """Return an arrow: straight beside boxes, bent between floors."""
    path = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        middle = (y0 + y1) / 2
        bend = f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} "
        path += f"{'L' if i % 2 else bend}{x1:.0f} {y1:.0f}"
    return f'<path d="{path}" marker-end="url(#head)"/>'


def box(package: Package, room: str, x: float, y: float) -> str:
    """Return a box with the name of a room and the first line of its docstring."""
    module = package.modules[room]
    folder = module.path.name == "__init__.py" and room != "__init__"
    said = re.sub("`+", "", (ast.get_docstring(module.tree) or "").partition("\n")[0])
    lines = textwrap.wrap(said, 30, max_lines=4, placeholder=" …")
    middle = x + BOX_WIDTH / 2
    texts = [
        f'<text class="line" x="{middle:.0f}" y="{y + 38 + 14 * i:.0f}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    name = f'<text class="name" x="{middle:.0f}" y="{y + 20:.0f}">{room}{"/" if folder else ".py"}</text>'
    return "".join([f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>', name, *texts])


# command line


def main() -> int:
    """Print the measures; return 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description="Measure the shape of a package.")
    parser.add_argument("--package", type=Path, default=PACKAGE, help="its folder")
    parser.add_argument("--details", action="store_true", help="name the places behind each number")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write the architecture as SVG")
    options = parser.parse_args()
    package = Package(options.package.resolve())
    measures = measure(package)
    for each in measures:
        print(each)
        for offender in each.offenders if options.details else ():
            print(f"    {offender}")
    if options.picture:
        options.picture.write_text(draw(package), encoding="utf-8")
    return int(any(each.is_broken for each in measures))


if __name__ == "__main__":
    sys.exit(main())
