"""``verl-fp16 tokens``: the tokens on which rollout and training policy differ most."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_fp16.cli.output import fail, is_terminal, print_table

if TYPE_CHECKING:
    from rich.text import Text

    from verl_fp16.mismatch.evidence_reading import Found

WORST = 20
_CONTEXT = "token in context"
_DISPENSABLE = ("sample", "pi", "mu", "log pi", "log mu")  # the first to go where it is narrow
_OTHERS = 8
_LEAST_CONTEXT, _ROOMY_CONTEXT = 8, 30


class Order(str, Enum):
    """Of what is shown."""

    gap = "gap"
    position = "position"
    length = "length"


def register(app: typer.Typer) -> None:
    app.command("tokens")(tokens)


def tokens(
    path: Annotated[
        # readable: typer would answer with a usage message what the reader has words for.
        Path,
        typer.Argument(
            metavar="PATH", readable=False, help="A tokens.parquet, a folder of a step, or a run's checkpoint folder."
        ),
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="How many tokens to show.")] = WORST,
    sort: Annotated[Order, typer.Option("--sort", help="Of the tokens with the largest gap, which come first.")] = (
        Order.gap
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the tokens on which rollout and training policy differ most, in their context.

    Of a folder with several steps, the newest is shown. In a token's context, what does not print is escaped as in
    Python, a backslash too.

    Example: verl-fp16 tokens checkpoints/my-run --top 5
    """
    try:
        from verl_fp16.mismatch.evidence_reading import EvidenceError, read

        found = read(path)
    except ImportError as error:
        raise fail(f"{visible(str(error))}: pyarrow is needed to read the tokens: pip install pyarrow") from None
    except EvidenceError as error:
        raise fail(visible(str(error))) from None
    shown = list(enumerate(found.tokens[:top], 1))
    if sort is not Order.gap:
        shown.sort(key=lambda numbered: numbered[1][sort.value])
    if as_json:
        typer.echo(json.dumps(_finite(_as_json(found, shown)), indent=2, allow_nan=False))
    else:
        _show(found, shown)


def visible(text: str) -> str:
    """``text`` with escapes for all that would not be seen or could steer a terminal, or that stdout cannot encode."""
    return "".join(_characters(text))


def _characters(text: str) -> list[str]:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return [_visible(character).encode(encoding, "backslashreplace").decode(encoding) for character in text]


def _visible(character: str) -> str:
    if character == "\\":
        return "\\\\"
    return character if character.isprintable() else ascii(character)[1:-1]


def _show(found: Found, shown: list[tuple[int, dict[str, Any]]]) -> None:
    typer.echo(visible(_headline(found)))
    if not found.tokens:
        typer.echo("there is no token in it")
    else:
        from rich.text import Text

        columns, rows = _columns([_cells(number, token) for number, token in shown])
        room = _room(columns, rows) if is_terminal(sys.stdout) else None
        texts = [_in_context(token, room) for _, token in shown]
        cells = [
            [text if name == _CONTEXT else Text(row[name]) for name in columns]
            for row, text in zip(rows, texts, strict=True)
        ]
        print_table(columns, cells, header=True)
        if left_out := [name for name in _DISPENSABLE if name not in columns]:
            typer.echo(f"left out for want of room: {' | '.join(left_out)}; --json has everything")
    for line in _lines(found, len(shown)):
        typer.echo(visible(line))


def _headline(found: Found) -> str:
    newest = ""
    if found.newest_of is not None:
        newest = f", the newest of {found.newest_of:,} steps" if found.newest_of > 1 else ", the only step there"
    step = _step(found)
    return f"{found.file}{'' if step is None else f': step {step}'}{newest}"


def _step(found: Found) -> int | None:
    steps = {token["step"] for token in found.tokens}
    return steps.pop() if len(steps) == 1 else found.facts.get("step")


def _cells(number: int, token: Mapping[str, Any]) -> dict[str, str]:
    """Column -> text, but for the context."""
    sample = token["sample_id"]
    return {
        "#": str(number),
        "gap": f"{token['log_ratio']:+.4g}",
        "log mu": f"{token['log_mu']:.4g}",
        "log pi": f"{token['log_pi']:.4g}",
        "mu": _probability(token["log_mu"]),
        "pi": _probability(token["log_pi"]),
        "position": f"{token['position']}/{token['length']}",
        _CONTEXT: "",
        "sample": visible(sample) if sample is not None else f"rank {token['rank']} row {token['row']}",
    }


def _probability(log: float) -> str:
    try:
        return f"{math.exp(log):.3g}"
    except OverflowError:
        return "inf"


def _columns(rows: list[dict[str, str]]) -> tuple[list[str], list[dict[str, str]]]:
    """The columns that a terminal has room for; all of them elsewhere."""
    names = list(rows[0])
    if is_terminal(sys.stdout):
        for name in _DISPENSABLE:
            if _room(names, rows) < _ROOMY_CONTEXT:
                names.remove(name)
    return names, rows


def _room(names: Iterable[str], rows: list[dict[str, str]]) -> int:
    """The width that the columns ``names`` leave to the context."""
    from rich.cells import cell_len

    others = [name for name in names if name != _CONTEXT]
    width = sum(max(len(name), *(cell_len(row[name]) for row in rows)) + 3 for name in others)
    return max(_LEAST_CONTEXT, shutil.get_terminal_size().columns - width - 4)


def _in_context(token: Mapping[str, Any], room: int | None) -> Text:
    """``before[token]after`` in ``room`` cells: where that is not enough, the far ends of the context are cut off."""
    from rich.text import Text

    before, inner, after = (_characters(token[name]) for name in ("before", "text", "after"))
    if room is not None:
        left = room - _width(inner) - 2
        after = _cut(after, max(left // 3, left - _width(before)))
        before = _cut(before[::-1], left - _width(after))[::-1]
    return Text.assemble("".join(before), (f"[{''.join(inner)}]", "bold reverse"), "".join(after))


def _width(characters: Iterable[str]) -> int:
    from rich.cells import cell_len

    return sum(cell_len(character) for character in characters)


def _cut(characters: list[str], room: int) -> list[str]:
    """The first of them that fit, and dots where some do not."""
    if _width(characters) <= room:
        return characters
    kept, left = [], room - 3
    for character in characters:
        left -= _width([character])
        if left < 0:
            break
        kept.append(character)
    return [*kept, "..."] if room >= 3 else []


def _lines(found: Found, shown: int) -> Iterable[str]:
    told = _summary(found)
    if found.tokens:
        rest = f"; {shown} of {len(found.tokens):,} are shown, --top shows more" if shown < len(found.tokens) else ""
        yield (
            "gap: log pi - log mu in nats, mu of the rollout, pi of the training; position: from 0 on, of the "
            f"response's length{rest}"
        )
        yield (
            f"of {told['tokens']:,} tokens in the file {told['first_share']:.0%} are the first of their response, "
            f"{told['last_share']:.0%} the last (by chance {told['chance']:.0%}); median position "
            f"{told['median_position']:g}, median length {told['median_length']:g}"
            + (f"; {told['not_finite']:,} have a log-probability that is not finite" if told["not_finite"] else "")
        )
    if found.sequences is not None:
        seen = found.facts.get("sequences_seen")
        of = f" of {seen:,}" if isinstance(seen, int) and seen != len(found.sequences) else ""
        mean = told["mean_log_ratio"]
        yield f"{len(found.sequences):,} sequences{of}" + ("" if mean is None else f", mean log-ratio {mean:+.4g} nats")
    dtypes = found.facts.get("dtypes")
    if isinstance(dtypes, Mapping) and dtypes:
        yield "dtypes: " + ", ".join(f"{role} {_listed(dtype)}" for role, dtype in dtypes.items())
    elif dtypes:
        yield f"dtypes: {dtypes}"
    for alarm in _alarms(found):
        yield f"alarm: {alarm.partition(' What to do: ')[0]}"
    if others := [f"{step}{' (alarm)' if alarm else ''}" for step, alarm in found.others]:
        newest = f"..., {', '.join(others[-_OTHERS:])}" if len(others) > _OTHERS else ", ".join(others)
        yield f"other steps beside it: {newest}; show one with verl-fp16 tokens {found.file.parent.parent}/step_NNNNNN"
    for note in found.notes:
        yield f"note: {note}"


def _listed(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _alarms(found: Found) -> list[str]:
    alarms = found.facts.get("alarms") or []
    return [str(alarm) for alarm in alarms] if isinstance(alarms, list) else [str(alarms)]


def _summary(found: Found) -> dict[str, Any]:
    worst, sequences = found.tokens, found.sequences
    return {
        "tokens": len(worst),
        "not_finite": sum(not math.isfinite(token["log_ratio"]) for token in worst),
        "first_share": sum(not token["before_ids"] for token in worst) / len(worst) if worst else None,
        "last_share": sum(not token["after_ids"] for token in worst) / len(worst) if worst else None,
        # Of a response of L tokens, 1 in L is the first one.
        "chance": statistics.mean(1 / max(1, token["length"]) for token in worst) if worst else None,
        "median_position": statistics.median(token["position"] for token in worst) if worst else None,
        "median_length": statistics.median(token["length"] for token in worst) if worst else None,
        "sequences": None if sequences is None else len(sequences),
        "mean_log_ratio": sum(row["log_ratio"] for row in sequences) / len(sequences) if sequences else None,
    }


def _as_json(found: Found, shown: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "file": str(found.file),
        "newest_of": found.newest_of,
        "others": [{"step": step, "alarm": alarm} for step, alarm in found.others],
        "step": _step(found),
        "tokens": [{"number": number, **token} for number, token in shown],
        "summary": _summary(found),
        "facts": found.facts,
        "notes": found.notes,
    }


def _finite(value: Any) -> Any:
    """With "inf", "-inf" and "nan" as text: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
