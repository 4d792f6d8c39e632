"""Builds HTML and SVG text; whatever is not made here is escaped, so names can not break a page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import chain

_VOID = {"meta", "br"}


class Markup(str):
    """Text that is HTML already; a plain str is not, and `tag` escapes it."""


def tag(name: str, /, *children: str | Iterable[str], **attributes: str | float | None) -> Markup:
    """Returns an element; children are text, elements, or iterables of both.

    Args:
        name: Of the element.
        children: A plain str is escaped.
        attributes: `class_` is written class, `stroke_width` stroke-width; None leaves it out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: str | Iterable[str]) -> Markup:
    """Returns the children one after the other, plain text escaped."""
    flat = chain.from_iterable([c] if isinstance(c, str) else c for c in children)
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in flat))


def _value(value: str | float) -> str:
    """Returns coordinates with two digits: a hundredth of a pixel shows nowhere."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)


def drawing(width: float, height: float, label: str, *children: str | Iterable[str]) -> Markup:
    """Returns an SVG that is as wide as its box, and scrolls in it below four fifths of `width`.

    Args:
        width: In pixels at which its text has its natural size.
        height: The same.
        label: What it shows, for those who can not see it.
        children: Its elements.
    """
    svg = tag(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        style=f"min-width:{width * 0.8:.0f}px;max-width:{width * 1.1:.0f}px",
        role="img",
        aria_label=label,
    )
    return tag("div", svg, class_="scroll")


def text(x: float, y: float, content: str, class_: str = "", **attributes: str | float) -> Markup:
    """Returns SVG text."""
    return tag("text", content, x=x, y=y, class_=class_ or None, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Returns an SVG line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], class_: str | None = None
) -> Markup:
    """Returns a table that scrolls in its box."""
    head = tag("tr", (tag("th", column) for column in columns))
    body = (tag("tr", (tag("td", cell) for cell in row)) for row in rows)
    content = tag("table", tag("thead", head), tag("tbody", body), class_=class_)
    return tag("div", content, class_="scroll")


def note(content: str) -> Markup:
    """Returns a sentence in small print."""
    return tag("p", content, class_="note")
