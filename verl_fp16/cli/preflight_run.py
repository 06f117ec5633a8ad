"""What ``verl-fp16 preflight`` prints of a model's run in FP16 on some prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from verl_fp16.cli.output import print_table
from verl_fp16.cli.preflight_weights import fitting

if TYPE_CHECKING:
    from verl_fp16.preflight.activations import Gradients
    from verl_fp16.preflight.passes import Measured
    from verl_fp16.preflight.sequences import Sequences

WORST = 12
_DISPENSABLE = ("kind", "weight gradient", "gradient zero")  # the first to go where it is narrow


@dataclass(frozen=True)
class Run:
    """A model's run.

    Args:
        seconds: of all passes.
        notes: of the tokens, the checkpoint and the device, in sentences.
    """

    measured: Measured
    sequences: Sequences
    device: str
    seconds: float
    notes: tuple[str, ...]


def show(run: Run, every: bool) -> None:
    """Print the table of the modules, the worst first, and the lines on the run and the loss scale."""
    rows = _rows(run.measured)
    shown = rows if every else rows[:WORST]
    columns, cells = fitting([_cells(row) for row in shown], _DISPENSABLE)
    print_table(columns, cells, header=True)
    rest = f"; shown are the {len(shown)} worst, --all shows every one" if len(shown) < len(rows) else ""
    typer.echo(
        f"{len(rows):,} modules in FP16 on {len(run.sequences.ids)} sequences, {run.sequences.tokens:,} tokens, the "
        f"longest {run.sequences.longest:,}, on {run.device} in {run.seconds:.1f} s{rest}"
    )
    typer.echo(f"{run.sequences.source}; activations and gradients depend on what is run")
    typer.echo(
        "headroom: 65,504 / largest |output|; gradients: largest of the outputs and of the module's weights, without "
        "loss scale"
    )
    if left_out := [name for name in _cells(rows[0]) if name not in columns]:
        typer.echo(f"left out, being zero or for want of room: {' | '.join(left_out)}; --json has everything")
    for line in _scale_lines(run.measured):
        typer.echo(line)


def as_json(run: Run) -> dict[str, Any]:
    """What was found, for ``json.dumps``."""
    measured, sequences = run.measured, run.sequences
    return {
        "source": sequences.source,
        "sequences": len(sequences.ids),
        "tokens": sequences.tokens,
        "longest": sequences.longest,
        "micro_batches": measured.micro_batches,
        "device": run.device,
        "seconds": run.seconds,
        "culprits": measured.culprits,
        "modules": [_module_json(row) for row in sorted(_rows(measured), key=lambda row: row["order"])],
        "parameters": _parameters_json(measured),
        "loss_scale": _scale_json(measured),
    }


def _rows(measured: Measured) -> list[dict[str, Any]]:
    """One for each module that gave numbers, the worst first: what is not finite, then what is closest to the limit."""
    from verl_fp16.preflight.run_verdict import HEADROOM, LARGEST, default_exponent

    gradients, weights = measured.largest_outputs, measured.largest_weights
    of_module: dict[str, float] = {}
    for name, largest in weights.items():
        module = name.rpartition(".")[0]
        of_module[module] = max(of_module.get(module, 0.0), largest)
    shown = _reported(measured)
    rows = []
    for order, (name, tally) in enumerate(measured.outputs.items()):
        if not tally.values:
            continue
        zero = shown.outputs.get(name) if shown is not None else None
        largest = max(gradients.get(name, 0.0), of_module.get(name, 0.0))
        rows.append(
            {
                "order": order,
                "name": name,
                "kind": measured.kinds[name],
                "tally": tally,
                "gradient": gradients.get(name),
                "weight_gradient": of_module.get(name),
                "zero_share": None if zero is None else zero.zero_share,
                "closeness": max(tally.largest * HEADROOM, largest * 2.0 ** default_exponent()) / LARGEST,
            }
        )
    # Of modules whose outputs are not finite, the first to run comes first.
    return sorted(
        rows,
        key=lambda row: (not row["tally"].non_finite, row["order"] if row["tally"].non_finite else -row["closeness"]),
    )


def _reported(measured: Measured) -> Gradients | None:
    """The gradients at the loss scale of which zeros are told: the default one, or the largest that is usable."""
    from verl_fp16.preflight.run_verdict import default_exponent

    found = measured.loss_scale
    if found is None or found.exponent is None:
        return None
    return measured.gradients.get(min(found.exponent, default_exponent()))


def _cells(row: dict[str, Any]) -> dict[str, str]:
    tally = row["tally"]
    return {
        "module": row["name"],
        "kind": row["kind"],
        "max |x|": f"{tally.largest:.4g}",
        "headroom": "-" if tally.headroom is None else f"{tally.headroom:.3g}",
        "inf, nan": f"{tally.non_finite:,}",
        "gradient": _number(row["gradient"]),
        "weight gradient": _number(row["weight_gradient"]),
        "gradient zero": "-" if row["zero_share"] is None else f"{row['zero_share']:.2g}",
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _scale_lines(measured: Measured) -> list[str]:
    from verl_fp16.preflight.run_verdict import default_exponent, largest_gradient

    found, default = measured.loss_scale, default_exponent()
    if found is None:
        return ["loss scale: not looked for, since the forward pass is not finite"]
    if found.exponent is None:
        if found.largest_at_one is None:
            return [f"loss scale: every one overflows, down to 2^{found.tried[-1]}"]
        return ["loss scale: all gradients are zero, so that none overflows"]
    seen = f"finite at 2^{found.exponent}, not at 2^{found.exponent + 1}" if found.verified else "finite at it"
    lines = [
        f"loss scale: the largest that does not overflow is 2^{found.exponent} = {found.scale:,.7g} ({seen}); the "
        f"largest gradient without it is {found.largest_at_one:.3g}, of {largest_gradient(measured)}"
    ]
    if found.exponent < default:
        skips = default - found.exponent
        lines.append(
            f"the default, 2^{default}, overflows here: a run may begin with up to {skips} skipped "
            f"update{'s' if skips > 1 else ''}; verl_fp16.loss_scale.init={found.scale:g} avoids them"
        )
    else:
        lines.append(f"the default, 2^{default}, does not overflow: nothing to set")
    shown = _reported(measured)
    if shown is not None and shown.outputs:
        worst = max(shown.outputs, key=lambda name: shown.outputs[name].zero_share)
        tally = shown.outputs[worst]
        values = sum(t.values for t in shown.outputs.values())
        zeros = sum(t.zeros for t in shown.outputs.values())
        lines.append(
            f"at {shown.scale:,.7g} at most {zeros / values:.2g} of the outputs' gradients become zero, of {worst} "
            f"{tally.zero_share:.2g}"
        )
    return lines


def _module_json(row: dict[str, Any]) -> dict[str, Any]:
    tally = row["tally"]
    return {
        "name": row["name"],
        "kind": row["kind"],
        "values": tally.values,
        "max_abs": tally.largest,
        "headroom": tally.headroom,
        "non_finite": tally.non_finite,
        "gradient_max_abs": row["gradient"],
        "weight_gradient_max_abs": row["weight_gradient"],
        "gradient_zero_share": row["zero_share"],
    }


def _parameters_json(measured: Measured) -> list[dict[str, Any]]:
    shown = _reported(measured)
    return [
        {
            "name": name,
            "gradient_max_abs": largest,
            "gradient_zero_share": shown.weights[name].zero_share if shown and name in shown.weights else None,
        }
        for name, largest in measured.largest_weights.items()
    ]


def _scale_json(measured: Measured) -> dict[str, Any] | None:
    from verl_fp16.preflight.run_verdict import default_exponent

    found = measured.loss_scale
    if found is None:
        return None
    shown, default = _reported(measured), 2.0 ** default_exponent()
    return {
        "default": default,
        "largest": found.scale,
        "verified": found.verified,
        "gradient_max_abs": found.largest_at_one,
        "advised": None if found.scale is None else min(default, found.scale),
        "zero_share_at": None if shown is None else shown.scale,
        "passes": [
            {
                "scale": gradients.scale,
                "max_abs": gradients.largest,
                "non_finite": gradients.non_finite,
                "first_non_finite": gradients.first_non_finite,
            }
            for _, gradients in sorted(measured.gradients.items())
        ],
    }
