"""A report of a diagnosis: one row for each check, then advice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from textwrap import fill
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check of a fit.

    Attributes:
        name: Name of the check.
        state: ``"ok"``, ``"failed"``, ``"noted"`` (a figure without a verdict on the fit) or ``"left out"``.
        value: The figure; ``None`` if the check was left out.
        limit: Limit of the figure; ``None`` if nothing is compared.
        found: The figure in words, with its unit.
        advice: Advice if the check failed; the reason if it was left out.
    """

    name: str
    state: str
    value: float | None
    limit: float | None
    found: str
    advice: str = ""

    @classmethod
    def of(cls, name: str, value: float, limit: float, found: str, *, failed: bool, advice: str) -> Check:
        """Return a completed check; a figure that is not finite fails."""
        bad = failed or not isfinite(value)
        return cls(name, "failed" if bad else "ok", value, limit, found, advice if bad else "")

    @classmethod
    def noted(cls, name: str, value: float, found: str, advice: str = "") -> Check:
        """Return a figure without a verdict."""
        return cls(name, "noted", value, None, found, advice)

    @classmethod
    def left_out(cls, name: str, why: str) -> Check:
        """Return a check that could not be made, and the reason."""
        return cls(name, "left out", None, None, "", why)


@dataclass(frozen=True)
class Report:
    """A list of checks of a fit, in order, which prints as a table with advice.

    >>> print(Report((Check.of("mean", 0.3, 0.2, "0.30 sd", failed=True, advice="Train longer."),)))
    1 of 1 checks failed
      mean                  failed    0.30 sd (limit 0.2)
    What to do
      mean: Train longer.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed; those left out do not count."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self if check.state == "failed")

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __getitem__(self, name: str) -> Check:
        checks = {check.name: check for check in self}
        if name not in checks:
            raise KeyError(f"There is no check {name!r}, only {', '.join(checks)}.")
        return checks[name]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Return the report of which `to_dict` gave the values."""
        return cls(tuple(Check(**check) for check in values["checks"]))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and words, ready for JSON: ``{"ok": …, "checks": [{"name": …, …}, …]}``."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self]}

    def __str__(self) -> str:
        made = [check for check in self if check.state in ("ok", "failed")]
        lines = [f"{len(self.failed) or 'none'} of {len(made)} checks failed"]
        for check in self:
            limit = f" (limit {check.limit:g})" if check.limit is not None else ""
            lines.append(f"  {check.name:22}{check.state:10}{check.found}{limit}".rstrip())
        for title, states in (("What to do", ("failed",)), ("To know", ("noted",)), ("Left out", ("left out",))):
            said: dict[str, list[str]] = {}
            for check in self:
                if check.state in states and check.advice:
                    said.setdefault(check.advice, []).append(check.name)
            lines += [title] if said else []
            lines += [_wrapped(f"{', '.join(names)}: {advice}") for advice, names in said.items()]
        return "\n".join(lines)


def _wrapped(text: str) -> str:
    return fill(text, 100, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
