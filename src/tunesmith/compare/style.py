"""Style and script of the report's page, and the policy that lets nothing else run on it.

The policy names both by their hashes, so whatever a model wrote or a run is called, it is text.
"""

from __future__ import annotations

import base64
import hashlib

from tunesmith.compare.plots import COLOURS

_LIGHT = ("#0b62a4", "#c2410c", "#0f766e", "#a21caf", "#8a6100", "#4b5563", "#b91c1c", "#4338ca")
_DARK = ("#6cb4ee", "#fb923c", "#34d399", "#e879f9", "#facc15", "#9ca3af", "#f87171", "#a5b4fc")


def _colours(colours: tuple[str, ...]) -> str:
    return " ".join(f"--k{i}: {colour};" for i, colour in enumerate(colours))


_PALETTE = f"""
:root {{ color-scheme: light dark; --ink: #1c1e21; --dim: #5b6168; --rule: #d5d8dc; --paper: #fff; --raised: #f4f5f7;
 {_colours(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e7e9; --dim: #a3a8ae; --rule: #3a3e44; --paper: #16181b;
 --raised: #202327; {_colours(_DARK)} }} }}
{" ".join(f".c{i} {{ --c: var(--k{i}) }}" for i in range(COLOURS))}
"""

_RULES = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; color: var(--ink);
 background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem } p, ul { margin: .4rem 0 }
.wide { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; overflow-wrap: normal }
table { border-collapse: collapse; width: 100% }
td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
 font-size: .9rem }
tbody tr:last-child td { border-bottom: 0 } thead th { background: var(--raised); vertical-align: bottom }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.word { white-space: nowrap } .best td { font-weight: 600 } .untuned td { color: var(--dim) }
.sortable td:first-child, .sortable th:first-child { position: sticky; left: 0; background: var(--paper) }
.sortable th:first-child { background: var(--raised) }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
 text-align: inherit; white-space: nowrap }
th button:focus-visible, summary:focus-visible { outline: 2px solid currentColor; outline-offset: 2px }
th[aria-sort] button::after { content: " \\2195"; color: var(--dim) }
th[aria-sort=ascending] button::after { content: " \\2191"; color: inherit }
th[aria-sort=descending] button::after { content: " \\2193"; color: inherit }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--rule); border-radius: 6px; padding: .5rem }
figcaption { font-weight: 600; font-size: .95rem } svg { display: block; width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .tick { fill: var(--dim) }
svg .letter { font-weight: 700 } .grid { stroke: var(--rule); stroke-width: 1; fill: none }
.line { fill: none; stroke: var(--c); stroke-width: 1.7 } .bar { stroke: var(--c); stroke-width: 1; fill: none }
.dot { fill: var(--paper); stroke: var(--c); stroke-width: 2 } .dot.full { fill: var(--c) }
.front { fill: none; stroke: var(--dim); stroke-width: 1.2; stroke-dasharray: 4 3 }
.key { display: inline-block; margin-right: 1rem } .key::before { content: ""; display: inline-block; width: .7rem;
 height: .7rem; border-radius: 50%; background: var(--c); margin-right: .35rem }
pre { white-space: pre-wrap; background: var(--raised); padding: .5rem; margin: .3rem 0; border-radius: 6px;
 font-size: .85rem; overflow-wrap: anywhere } details { margin: .5rem 0 } summary { cursor: pointer; font-weight: 600 }
.dim { color: var(--dim); font-size: .9rem }
"""

STYLE = _PALETTE + _RULES

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.v;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const known = head.dataset.number && !isNaN(x) && !isNaN(y);
      return (known ? x - y : x.localeCompare(y, "en", {numeric: true})) * (up ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  }));
}
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY = (
    f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; form-action 'none'"
)
