"""How the page of a run looks: light or dark, as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["STYLE"]

_LIGHT = (
    *("#1d4ed8", "#b45309", "#15803d", "#a21caf", "#475569"),
    *("#0891b2", "#be123c", "#6d28d9", "#7c6f0a", "#db2777"),
)
_DARK = (
    *("#8fb0ff", "#ffb04d", "#6cd69b", "#e79bf2", "#a8b3c4"),
    *("#5fd0e6", "#ff94a8", "#c0a6ff", "#d8cb5a", "#ff9bcb"),
)
_PARTS_LIGHT = ("#4f7be8", "#e08a2e", "#8d6fd1", "#b4bfcc", "#3da27a", "#d36a8c")
_PARTS_DARK = ("#6f95f5", "#e39a4a", "#a58be0", "#5b6878", "#56b990", "#dc7f9e")


def _colours(name: str, colours: Sequence[str]) -> str:
    return " ".join(f"--{name}{index}: {colour};" for index, colour in enumerate(colours))


STYLE = f"""
:root {{
  color-scheme: light dark;
  --ground: #f6f7f9; --card: #ffffff; --ink: #17202b; --soft: #556274; --line: #d5dbe4;
  --good: #0f6b3c; --bad: #a91e2c; --tint: #eef3fd;
  {_colours("s", _LIGHT)} {_colours("p", _PARTS_LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --ground: #10141b; --card: #181e28; --ink: #e7ebf2; --soft: #a2aebf; --line: #38424f;
    --good: #6cd69b; --bad: #ff949d; --tint: #1e2a40;
    {_colours("s", _DARK)} {_colours("p", _PARTS_DARK)}
  }}
}}
@media print {{ figure, tr {{ break-inside: avoid; }} }}
* {{ box-sizing: border-box; }}
html {{ scroll-behavior: smooth; }}
body {{ margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }}
h1 {{ margin: 0; font-size: 1.7rem; }}
h2 {{ margin: 0 0 .5rem; font-size: 1.25rem; }}
h3 {{ margin: 0 0 .3rem; font-size: 1rem; }}
p {{ margin: .4rem 0; }}
header p {{ max-width: 60rem; }}
ul {{ margin: .6rem 0; padding-left: 1.2rem; }}
.soft, caption, figcaption {{ color: var(--soft); }}
section {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.1rem 1.4rem 1.3rem; margin: 1.1rem 0; }}
nav {{ display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .8rem; }}
nav a {{ padding: .15rem .7rem; border: 1px solid var(--line); border-radius: 99px;
  background: var(--card); color: inherit; text-decoration: none; font-size: .9rem; }}
nav a:hover {{ border-color: var(--soft); }}
.warn {{ border-left: 4px solid var(--bad); background: var(--card); padding: .1rem .9rem; }}
.scroll {{ overflow-x: auto; }}
.scroll:focus-visible, summary:focus-visible, a:focus-visible {{ outline: 3px solid var(--s0); }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .4rem; font-size: .88rem; }}
th, td {{ text-align: right; vertical-align: top; padding: .35rem .55rem;
  border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: .3rem; }}
thead th {{ color: var(--soft); font-weight: 600; font-size: .85rem; vertical-align: bottom; }}
tbody th {{ font-weight: 500; }}
tbody tr:hover {{ background: var(--tint); }}
tr.ours th {{ font-weight: 700; }}
.bounds th {{ white-space: normal; }}
.bounds td:last-child .small {{ white-space: normal; max-width: 24rem; margin-left: auto; }}
.facts th {{ width: 7rem; color: var(--soft); }}
.facts td {{ text-align: left; white-space: normal; overflow-wrap: anywhere; }}
.small {{ display: block; color: var(--soft); font-weight: 400; font-size: .82em; }}
.narrow {{ white-space: normal; max-width: 13.5rem; margin-left: auto; }}
.pass {{ color: var(--good); font-weight: 600; }}
.fail {{ color: var(--bad); font-weight: 600; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr));
  gap: 1.6rem 2rem; margin-top: 1.2rem; align-items: start; }}
figure {{ margin: 0; min-width: 0; }}
.wide {{ grid-column: 1 / -1; }}
figcaption {{ font-size: .86rem; max-width: 52rem; }}
figure > svg {{ display: block; width: 100%; height: auto; }}
figure > svg * {{ stroke-linejoin: round; }}
svg text {{ font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
.l {{ transition: opacity .12s; }}
.grid, .spine {{ fill: none; stroke: var(--line); stroke-width: .7; }}
.tick {{ font-size: 9.5px; text-anchor: end; fill: var(--soft); }}
.below {{ text-anchor: middle; }}
.keys {{ display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .84rem;
  margin-bottom: .3rem; }}
.servers {{ position: sticky; top: 0; z-index: 1; background: var(--card); padding: .5rem 0;
  margin: .8rem 0 0; border-bottom: 1px solid var(--line); }}
.servers + .plots {{ margin-top: .8rem; }}
.key {{ white-space: nowrap; cursor: default; }}
.w {{ height: .75em; width: auto; margin-right: .45em; vertical-align: -.02em; }}
th .w {{ width: 1.7em; }}
pre, code {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .84rem; }}
code {{ overflow-wrap: anywhere; }}
pre {{ overflow-x: auto; max-height: 30rem; background: var(--ground); padding: .7rem .9rem;
  border-radius: 8px; }}
details {{ margin: .7rem 0; }}
details > summary {{ cursor: pointer; font-weight: 600; }}
"""
