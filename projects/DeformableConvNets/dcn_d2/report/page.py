# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Pieces of HTML. All text that comes from files goes through `text`, which makes it harmless."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #5f6b7a; --page: #fbfbfa; --card: #ffffff; --line: #dfe3e8;
  --accent: #2f6fad; --bad: #b3402f; --good: #2c7a5b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --dim: #9aa5b1; --page: #14171b; --card: #1c2026;
  --line: #323841; --accent: #6cb0ef; --bad: #ef8a78; --good: #6fcfa5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 19px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 6px 0; } .dim { color: var(--dim); font-size: 13px; } .lead { margin: 8px 0 18px; font-size: 16px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 16px 0; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; white-space: nowrap; line-height: 1.3; font-weight: 600; }
.tile span { color: var(--dim); font-size: 12.5px; }
table { border-collapse: collapse; font-size: 13.5px; margin: 8px 0; }
th, td { padding: 4px 12px 4px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--dim); font-weight: 500; white-space: nowrap; } td.n, th.n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
table.matrix td, table.matrix th { padding: 3px 7px; border: 1px solid var(--line); }
.row { display: flex; flex-wrap: wrap; gap: 8px 24px; align-items: flex-start; } .row > * { flex: 0 1 auto; }
svg { width: 100%; height: auto; display: block; } .row > .plot { flex: 1 1 380px; min-width: 0; }
figure { margin: 14px 0; } figure img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
figcaption { font-size: 13px; color: var(--dim); margin-top: 4px; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin: 8px 0; } code { font-size: 13px; overflow-wrap: anywhere; }
nav a { color: var(--accent); margin-right: 14px; text-decoration: none; white-space: nowrap; }
.missing { color: var(--dim); } .warn { color: var(--bad); }
@media print { body { max-width: none; } section { break-inside: avoid; } }
"""


def text(value: object) -> str:
    """Makes text harmless in HTML; bytes of a file name that are no text become question marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def number(value: float | None, digits: int = 1) -> str:
    """Gives a number, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Gives a time as a person would say it."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days or hours:
        return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = (), kind: str = "") -> str:
    """Gives a table; cells are text and become harmless here.

    Args:
        head: the names of the columns.
        rows: of as many cells.
        numbers: the columns that are numbers; they stand on the right of their cells.
        kind: a class of the style sheet.
    """
    right = set(numbers)

    def line(tag: str, cells: Sequence[Any]) -> str:
        styles = (' class="n"' if index in right else "" for index in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{style}>{text(cell)}</{tag}>" for cell, style in zip(cells, styles)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<table class="{kind}"><thead>{line("th", head)}</thead><tbody>{body}</tbody></table>'


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Gives boxes with one large value and its name each."""
    cells = (f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in facts)
    return f'<div class="tiles">{"".join(cells)}</div>'


def picture(data: bytes, caption: str, kind: str = "jpeg") -> str:
    """Gives a picture that is inside of the page; `caption` is HTML already."""
    address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="" src="{address}"><figcaption>{caption}</figcaption></figure>'


def details(title: str, body: str) -> str:
    """Gives a part that opens by a click."""
    return f"<details><summary>{text(title)}</summary>{body}</details>"


def page(title: str, lead: str, parts: Sequence[tuple[str, str]]) -> str:
    """Gives the whole page.

    Args:
        title: text.
        lead: HTML below the title.
        parts: titles as text, and HTML.
    """
    links = "".join(f'<a href="#part{index}">{text(name)}</a>' for index, (name, _) in enumerate(parts))
    sections = "".join(
        f'<section id="part{index}"><h2>{text(name)}</h2>{body}</section>' for index, (name, body) in enumerate(parts)
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="generator" content="dcn_d2">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><h1>{text(title)}</h1>{lead}"
        f"<nav>{links}</nav>{sections}</body></html>\n"
    )
