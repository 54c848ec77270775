"""Write a table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a title above a table in HTML, escaped; the first cell of each row names it, the others are numbers.

    >>> table("a < b", ["", "mean"], [["mu", "1.0"]])[:50]
    '<div><p>a &lt; b</p><table><thead><tr><th></th><th'
    """
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, *cells in rows
    )
    head = "".join(f"<th>{escape(caption)}</th>" for caption in header)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""
    return f"<div><p>{escape(title)}</p>{whole}</div>"
