"""One self-contained HTML file made of sections: it opens from disk, asks for nothing, and is read
in light and dark, on a desk and on a phone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from zerort.report.style import SCRIPT, STYLE

__all__ = ["Section", "document", "figure", "paragraph", "table"]


@dataclass(frozen=True)
class Section:
    """A heading, what is to be seen below it in plain words, and HTML."""

    title: str
    words: str
    body: str
    anchor: str


def document(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """A whole page. `lead` is HTML below its title."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # a browser would else ask a server for an icon
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>{escape(title)}</h1>\n{lead}\n{''.join(map(_section, sections))}"
        '</main><div id="tip"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    return (
        f'<section id="{escape(section.anchor)}"><h2>{escape(section.title)}</h2>'
        f"{paragraph(section.words)}{section.body}</section>\n"
    )


def paragraph(words: str, kind: str = "") -> str:
    """Plain text."""
    if not words:
        return ""
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def figure(body: str, caption: str = "") -> str:
    """A picture and what to see in it."""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{body}{words}</figure>"


def table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """`heads` are (words, class); cells are HTML. On a phone each row is a block of its own."""
    top = "".join(f'<th class="{kind}">{escape(words)}</th>' for words, kind in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{kind}" data-head="{escape(words)}">{cell}</td>'
            for cell, (words, kind) in zip(row, heads, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
