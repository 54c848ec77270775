"""Declare options once: a frozen dataclass holds the default, check and documentation of each.

::

    @documented
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        num_steps: int = option(100, "Number of steps.", group="schedule", check=check_whole)
        __post_init__ = check_options


    class Options(TypedDict, total=False):  # the same names and types, for editors and type checkers
        num_steps: int


    @with_options(Settings)
    def train(x: Tensor, *, settings: Settings | None = None, **options: Unpack[Options]) -> None:
        settings = from_options(Settings, options, settings, of=train)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field, fields, replace
from textwrap import TextWrapper
from typing import Any, TypeVar

from implicitvi.errors import OptionError, did_you_mean, plain_number

T = TypeVar("T")
Check = Callable[[str, Any], object]
WIDTH = 100  # of the entries in a docstring


def option(default: T, doc: str, *, group: str = "", check: Check | None = None, decisive: bool = True) -> T:
    """Return a dataclass field that declares an option.

    Args:
        default: Its default.
        doc: Its documentation: one paragraph.
        group: Title under which documentation lists it; options of a group stand together.
        check: Function of the option's name and value that raises `OptionError` where the value cannot work.
        decisive: Whether it decides results, so that a checkpoint can only be resumed with the same value.
    """
    return field(default=default, metadata={"doc": doc, "group": group, "check": check, "decisive": decisive})


def check_options(settings: Any) -> None:
    """Bring numbers of any kind to Python's own, and run the check of every option; for ``__post_init__``."""
    for each in fields(settings):
        object.__setattr__(settings, each.name, plain_number(getattr(settings, each.name)))
        if each.metadata["check"] is not None:
            each.metadata["check"](each.name, getattr(settings, each.name))


def optional(check: Check) -> Check:
    """Return a check that also accepts ``None``."""
    return lambda name, value: None if value is None else check(name, value)


def values_of(settings: Any, *, decisive: bool = False) -> dict[str, Any]:
    """Return the options by name as they are, or only the decisive ones."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.metadata["decisive"] or not decisive}


def from_options(
    cls: type[T], given: Mapping[str, Any], settings: T | None = None, *, of: Callable[..., Any] | type
) -> T:
    """Return the settings, ``None`` for the defaults, with the given options in place of theirs.

    An unknown option is a `TypeError` that names a similar one of the function or class ``of``.
    """
    names = [each.name for each in fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            near = did_you_mean(name, [*names, *inspect.signature(of).parameters])
            raise TypeError(f"{of.__qualname__}() got an unexpected keyword argument {name!r}. {near}".rstrip())
    if settings is None:
        return cls(**given)
    if not isinstance(settings, cls):
        raise OptionError.must_be("settings", f"a {cls.__name__}", repr(settings))
    return replace(settings, **given)  # type: ignore[type-var]


def documented(cls: type[T]) -> type[T]:
    """Add the options of a dataclass to its own docstring."""
    cls.__doc__ = _with_entries(cls.__doc__ or "", cls)
    return cls


def with_options(settings: type) -> Callable[[T], T]:
    """Return a decorator that lists the options of a dataclass in a signature, for ``**options``, and a docstring."""

    def decorate(target: T) -> T:
        target.__doc__ = _with_entries(target.__doc__ or "", settings)
        function: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        function.__signature__ = _with_parameters(inspect.signature(function), settings)
        return target

    return decorate


def grouped(settings: type) -> dict[str, list[str]]:
    """Return the names of the options of each group."""
    groups: dict[str, list[str]] = {}
    for each in fields(settings):
        groups.setdefault(each.metadata["group"], []).append(each.name)
    return groups


def _with_entries(text: str, settings: type) -> str:
    """Return a docstring with an entry for each option at the end of its section ``Args``."""
    lines = inspect.cleandoc(text).splitlines()
    if "Args:" not in lines:
        lines += ["", "Args:"]
    start = lines.index("Args:")
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    fill = TextWrapper(WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    entries = [fill.fill(f"{each.name}: {each.metadata['doc']}") for each in fields(settings)]
    return "\n".join([*lines[:end], *entries, *lines[end:]]) + "\n"


def _with_parameters(signature: inspect.Signature, settings: type) -> inspect.Signature:
    """Return a signature with the options as keywords, each with its default, in place of ``**options``."""
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(settings)
    ]
    return signature.replace(parameters=[*own, *options])
