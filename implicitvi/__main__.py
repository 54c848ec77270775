"""Print entries of the FAQ: ``python -m implicitvi faq [ANCHOR]``."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from implicitvi.errors import did_you_mean

WIDTH = 100  # of printed lines


class Entry(NamedTuple):
    """A section of the FAQ, its subsections included."""

    heading: str
    depth: int
    body: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: print one entry of the FAQ, or all anchors."""
    parser = argparse.ArgumentParser(prog="python -m implicitvi", description="Answers to questions about a fit.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    faq = commands.add_parser("faq", help="print an entry of the FAQ, or all anchors")
    faq.add_argument("anchor", nargs="?", help="the entry to print")
    asked = parser.parse_args(arguments).anchor
    entries = read_entries()
    if asked is None:
        print(contents(entries))
    elif asked in entries:
        print(plain(f"# {entries[asked].heading}\n\n{entries[asked].body}"))
    else:
        faq.error(f"the FAQ does not have the entry {asked!r}. {did_you_mean(asked, entries)}".strip())


def read_entries() -> dict[str, Entry]:
    """Return every section of the FAQ by its anchor, in order."""
    text = files("implicitvi").joinpath("faq.md").read_text(encoding="utf-8")
    entries = {}
    for start in re.finditer(r"^##(#*) (.+)$", text, re.M):
        end = re.search(rf"^##{start[1] and '#?'} ", text[start.end() :], re.M)
        body = text[start.end() :][: end.start() if end else None]
        entries[anchor_of(start[2])] = Entry(start[2], len(start[1]), body.strip())
    return entries


def anchor_of(heading: str) -> str:
    """Return the anchor by which links name a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def contents(entries: dict[str, Entry]) -> str:
    """Return a table of anchors and headings."""
    width = 2 + max(map(len, entries))
    rows = [f"{'  ' * entry.depth + anchor:{width}}  {entry.heading}" for anchor, entry in entries.items()]
    return "\n".join(["Print an entry: python -m implicitvi faq ANCHOR\n", *rows])


def plain(markdown: str) -> str:
    """Return Markdown as text for a terminal: paragraphs are wrapped, code is indented, links show their targets."""
    blocks = []
    for i, part in enumerate(re.split(r"^```\w*\n(.*?)^```$", markdown, flags=re.M | re.S)):
        if i % 2:
            blocks.append(textwrap.indent(part.rstrip(), "    "))
        else:
            blocks += map(plain_paragraph, re.split(r"\n\n+|\n(?=- )", part.strip())) if part.strip() else []
    return "\n\n".join(blocks).replace("\n\n- ", "\n- ")


def plain_paragraph(text: str) -> str:
    """Return a heading with a line below it; wrap a paragraph or an item of a list."""
    text = re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", plain_link, text)
    if text.startswith("#"):
        marks, _, heading = text.partition(" ")
        return f"{heading}\n{('=' if marks == '#' else '-') * len(heading)}"
    margin = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, WIDTH, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False)


def plain_link(link: re.Match[str]) -> str:
    """Return the text of a link, and its page in parentheses where it has one."""
    text, target = link.groups()
    return text if target.startswith("#") else f"{text} ({target.removeprefix('../')})"


if __name__ == "__main__":
    main()
