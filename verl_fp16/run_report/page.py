"""The report as one HTML file: nothing is loaded from elsewhere, nothing runs in it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import groupby

from verl_fp16.run_report import contents
from verl_fp16.run_report.assemble import Run
from verl_fp16.run_report.curves import PANELS, typeset
from verl_fp16.run_report.figures import COLOURS, DARK_COLOURS, as_svg, marks_of

_SYMBOLS = {"v": "▼", "X": "✖", "x": "×"}
_BORDERS = ("solid", "dashed", "dotted")


def render(title: str, date: str, runs: Sequence[Run], window: int | None) -> str:
    """The whole file; arguments as of :func:`markdown.render`."""
    return "\n".join(_parts(title, date, runs, window)) + "\n"


def _parts(title: str, date: str, runs: Sequence[Run], window: int | None) -> Iterator[str]:
    yield "<!doctype html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    # A browser holds the page to it, whatever text of a run's is in it.
    yield (
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
    )
    yield f"<title>{_text(title)}</title>"
    yield f"<style>{_style()}</style></head><body>"
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    yield f'<header><h1>{_text(title)}</h1><p class="quiet">{count} · verl-fp16 report, {_text(date)}</p></header>'
    yield "<main>"
    yield from _findings(runs)
    yield from _table(runs)
    yield from _legend(runs)
    for group, panels in contents.groups(runs):
        yield f'<section><h2>{_text(group)}</h2><div class="panels">'
        for panel in panels:
            yield f"<figure><figcaption><h3>{_text(panel.title)}</h3>"
            yield f'<span class="quiet"><code>{_text(contents.remark(panel, runs))}</code></span></figcaption>'
            yield f"{as_svg(panel, runs, window)}</figure>"
        yield "</div></section>"
    for index, run in enumerate(runs):
        yield from _run(run, index)
    yield '<section><h2>How to read this</h2><ul class="quiet">'
    yield from (f"<li>{_text(line)}</li>" for line in contents.explanation(window))
    yield "</ul></section></main></body></html>"


def _style() -> str:
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    for theme, colours in (("LIGHT", COLOURS), ("DARK", DARK_COLOURS)):
        variables = " ".join(f"--run{index}: {colour};" for index, colour in enumerate(colours))
        style = style.replace(f"/* {theme} */", variables)
    return style


def _text(text: str) -> str:
    return html.escape(contents.printable(text))


def _with_code(text: str) -> str:
    """With what is between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(text))


def _swatch(index: int) -> str:
    border = _BORDERS[index // len(COLOURS) % len(_BORDERS)]
    style = f"border-color: var(--run{index % len(COLOURS)}); border-top-style: {border}"
    return f'<span class="swatch" style="{style}"></span>'


def _findings(runs: Sequence[Run]) -> Iterator[str]:
    yield "<section><h2>Where it went wrong</h2>"
    found = [(index, run, finding) for index, run in enumerate(runs) for finding in run.findings]
    if not found:
        yield f'<p class="well">{_text(contents.nothing_found(runs))}</p></section>'
        return
    yield '<ul class="findings">'
    for index, run, finding in found:
        where = f'{_swatch(index)}{_text(run.name)} <span class="step">step {finding.step:,}</span>'
        kind = ' class="mild"' if finding.kind == "ended" else ""
        yield f'<li{kind}><span class="where">{where}</span>'
        yield f"<p>{_with_code(_sentence(finding.text))}</p>"
        if finding.advice:
            yield f'<p class="quiet">What to do: {_with_code(finding.advice)}.</p>'
        if finding.command:
            yield f'<p class="quiet">Its tokens: <code>{_text(finding.command)}</code></p>'
        yield "</li>"
    yield "</ul></section>"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _table(runs: Sequence[Run]) -> Iterator[str]:
    """A single run's metrics in a row each; those of several in a group of rows under the metric's name."""
    single = len(runs) == 1
    columns = ["metric" if single else "", *contents.COLUMNS[2:]]
    yield '<section><h2>First, last, best</h2><div class="scroll"><table class="numbers"><thead><tr>'
    for number, name in enumerate(columns):
        yield f'<th scope="col"{" class=number" if number else ""}>{name}</th>'
    yield "</tr></thead>"
    for panel, grouped in groupby(contents.rows(runs), key=lambda row: row.panel):
        about = f'{_text(panel.title)} <span class="quiet">{_text(contents.unit_and_direction(panel))}</span>'
        yield "<tbody>"
        if not single:
            yield f'<tr><th scope="rowgroup" colspan="{len(columns)}">{about}</th></tr>'
        for row in grouped:
            _, name, *numbers = row.cells()
            label = f'<th scope="row">{about}</th>' if single else f"<td>{_swatch(row.index)}{_text(name)}</td>"
            yield f"<tr>{label}{_cells(numbers)}</tr>"
        yield "</tbody>"
    yield "</table></div>"
    if missing := contents.unmeasured(runs):
        yield f'<p class="quiet">{_text(missing)}</p>'
    yield "</section>"


def _cells(numbers: Iterable[str]) -> str:
    return "".join(f'<td class="number">{_text(typeset(number))}</td>' for number in numbers)


def _legend(runs: Sequence[Run]) -> Iterator[str]:
    yield '<ul class="legend stuck">'
    for index, run in enumerate(runs):
        yield f"<li>{_swatch(index)}{_text(run.name)}</li>"
    for symbol, meaning in marks_of(runs, PANELS):
        yield f'<li class="group"><span class="mark">{_SYMBOLS.get(symbol, "┊")}</span>{_text(meaning)}</li>'
    yield "</ul>"


def _run(run: Run, index: int) -> Iterator[str]:
    yield f"<section><h2>{_swatch(index)} {_text(run.name)}</h2><dl>"
    yield from (f"<dt>{_text(label)}</dt><dd>{_text(text)}</dd>" for label, text in contents.facts(run))
    yield from (f"<dt>note</dt><dd>{_text(note)}</dd>" for note in run.notes)
    yield "</dl>"
    if run.evidence.tokens:
        yield f"<h3>{_text(contents.tokens_heading(run))}</h3>"
        yield '<div class="scroll"><table class="tokens"><thead><tr>'
        for column in contents.TOKEN_COLUMNS:
            kind = "" if column == contents.TOKEN_COLUMNS[-1] else ' class="number"'
            yield f'<th scope="col"{kind}>{_text(column)}</th>'
        yield "</tr></thead><tbody>"
        for token in run.evidence.tokens:
            *numbers, (before, inner, after) = contents.token_cells(token)
            yield f"<tr>{_cells(numbers)}<td>{_text(before)}<mark>{_text(inner)}</mark>{_text(after)}</td></tr>"
        yield "</tbody></table></div>"
    if run.evidence.command:
        yield f"<pre><code>{_text(run.evidence.command)}</code></pre>"
    yield "</section>"
