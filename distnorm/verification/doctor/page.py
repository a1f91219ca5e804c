"""The doctor's page: one HTML file with the picture of the model's layers, wrong ones marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from distnorm.verification.doctor.judging import Verdict
from distnorm.verification.ranks import rank_list

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1b1f24; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; }
.unproved { border-left: 4px solid #6e7781; padding: .4rem .8rem; background: #f3f4f6; }
.cause { border-left: 4px solid #b3261e; padding: .4rem .8rem; background: #fdf1f0; }
.fine { border-left: 4px solid #1a7f37; padding: .4rem .8rem; background: #effaf2; }
.layers { display: flex; flex-wrap: wrap; gap: .4rem; margin: 1rem 0; }
.layer { border: 1px solid #c9d1d9; border-radius: 4px; padding: .25rem .5rem; font-size: .85rem; }
.wrong { background: #f9d7d4; border-color: #b3261e; } .right { background: #e3f6e8; }
.dead { background: #e6e8eb; }
.layer.wrong { font-weight: 600; } .layer.wrong::before { content: "\\2717\\00a0"; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 44rem; font-size: .9rem; }
th:first-child, td:first-child { overflow-wrap: normal; }
td:nth-child(2) { min-width: 16rem; }
td, th { border-bottom: 1px solid #e1e4e8; padding: .25rem .5rem; text-align: left; vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117; }
  .layer { border-color: #484f58; } .unproved { background: #1c2128; }
  .wrong { background: #5c1a16; } .right { background: #12351d; } .dead { background: #30363d; }
  .cause { background: #2d1210; } .fine { background: #0f2416; } td, th { border-color: #30363d; } }
"""
_NO_CAUSE = {
    True: '<p class="fine">No cause to look for.</p>',
    False: '<p class="unproved">Nothing was found wrong, and not everything is proved.</p>',
}


def page(
    verdicts: Sequence[Verdict],
    headline: str,
    cause: str | None,
    facts: Sequence[tuple[str, str]],
    ok: bool,
) -> str:
    """Write the page.

    Args:
        verdicts: of every parameter, in the order of the forward.
        headline: one sentence.
        cause: what explains what is wrong; `None` where nothing is.
        facts: further lines, each with its name.
        ok: whether every gradient is proved right.
    """
    body = [
        f"<h1>{escape(headline)}</h1>",
        f'<p class="cause">{escape(cause)}</p>' if cause else _NO_CAUSE[ok],
        *(f"<p><b>{escape(name)}</b> {escape(text)}</p>" for name, text in facts),
        '<div class="layers">',
        *_layers(verdicts),
        "</div>",
        '<div class="scroll" tabindex="0"><table><thead><tr><th>parameter<th>what explains it',
        *(f'<th class="number">{name}' for name in ("difference", "allowed", "cosine", "scale")),
        "</tr></thead><tbody>",
        *map(_row, verdicts),
        "</tbody></table></div>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(headline)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _layers(verdicts: Sequence[Verdict]) -> Iterator[str]:
    layers: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        layers.setdefault(verdict.name.rpartition(".")[0] or verdict.name, []).append(verdict)
    for name, theirs in layers.items():
        text = "; ".join(f"{v.name}: {v.explanations[0].text}" for v in theirs if v.is_wrong)
        yield f'<span class="layer {_state(theirs)}" title="{escape(text)}">{escape(name)}</span>'


def _state(verdicts: Sequence[Verdict]) -> str:
    if any(verdict.is_wrong for verdict in verdicts):
        return "wrong"
    return "dead" if any(verdict.is_dead for verdict in verdicts) else "right"


def _row(verdict: Verdict) -> str:
    numbers = (verdict.difference, verdict.tolerance, verdict.cosine, verdict.scale)
    cells = "".join(f'<td class="number">{"" if n is None else f"{n:.3g}"}' for n in numbers)
    text = "<br>".join(
        escape(f"{e.mistake.value}: {e.text}" + (f" ({rank_list(list(e.ranks))})" if e.ranks else ""))
        for e in verdict.explanations
    )
    if verdict.is_dead:
        text = "zero or absent on both sides, which proves nothing"
    return f'<tr class="{_state([verdict])}"><td>{escape(verdict.name)}<td>{text}{cells}</tr>'
