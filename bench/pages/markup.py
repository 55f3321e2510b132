"""The pieces of HTML that the page of a run is made of."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from bench.pages.drawing import DASHES, SERIES, Key
from bench.samples import Samples

__all__ = ["items", "legend", "named", "row_class", "small", "swatch", "table", "text"]


def text(value: object) -> str:
    """Anything, as it may stand in HTML."""
    return html.escape(str(value), quote=True)


def items(sentences: Iterable[str]) -> str:
    """A list of sentences, which are no HTML yet."""
    return "<ul>" + "".join(f"<li>{text(each)}</li>" for each in sentences) + "</ul>"


def small(content: str, more: str = "") -> str:
    """HTML in small letters on a line of its own, with `more` as a class; nothing for nothing."""
    kind = f"small {more}".strip()
    return f'<span class="{kind}">{content}</span>' if content else ""


def table(caption: str, header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table of cells that are HTML already.

    Args:
        caption: Above it; no HTML yet.
        header: Of the columns.
        rows: Each with its class, and its cells, of which the first names it.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{cells[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells[1:])
        + "</tr>"
        for kind, cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{text(caption)}" tabindex="0"><table>'
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def swatch(colour: str) -> str:
    """What a server's line, `s3`, or a part, `p1`, looks like."""
    if colour.startswith("p"):
        return (
            '<svg class="w" viewBox="0 0 12 12">'
            f'<path d="M0 0h12v12H0z" fill="var(--{colour})"/></svg>'
        )
    index = int(colour[1:])
    dashes = " ".join(f"{2 * part:g}" for part in DASHES[index % len(DASHES)])
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<svg class="w" viewBox="0 0 26 12"><path d="M0 6h26" stroke-width="3.4" '
        f'stroke="var(--s{index % SERIES})"{dashed}/></svg>'
    )


def legend(keys: Iterable[Key]) -> str:
    """Names beside what they look like; pointing at that of a server shows it alone."""
    return "".join(
        f'<span class="key{f" k{key.colour[1:]}" if key.colour.startswith("s") else ""}">'
        f"{swatch(key.colour)}{text(key.label)}</span>"
        for key in keys
    )


def named(samples: Samples, server: str) -> str:
    """The title of a server beside its line."""
    return f"{swatch(f's{samples.servers.index(server)}')}{text(samples.title(server))}"


def row_class(samples: Samples, server: str) -> str:
    """The class of a server's row in a table."""
    ours = " ours" if server == samples.reference() else ""
    return f"k{samples.servers.index(server)}{ours}"
