#!/usr/bin/env python3
"""Write the generated tables of README and docs, or check that they are current.

Measurements come from the files under benchmarks/results, the hooks from their records, the versions from the pins.

python scripts/readme_tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gpu_page  # noqa: E402
import recipes_page  # noqa: E402

from verl_fp16.hooks import HOOKS  # noqa: E402
from verl_fp16.patching import Hook  # noqa: E402
from verl_fp16.releases import SUPPORTED_VERL  # noqa: E402

README, GAP, PREFLIGHT = ROOT / "README.md", ROOT / "docs" / "gap.md", ROOT / "docs" / "preflight.md"
RESULTS = ROOT / "benchmarks" / "results"

_ROWS = {
    "fp16": "`+precision=fp16`",
    "bf16": "`+precision=bf16`",
    "documented keys (fsdp_config.dtype=float16, rollout.dtype=float16)": (
        "verl's documented FP16 keys, without this package"
    ),
    "fp32": "`+precision=fp32`",
}


def _interval(value: dict, form: str) -> str:
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def gap_table() -> str:
    """The gap of each precision pair, from ``gap-cpu.json``."""
    result = json.loads((RESULTS / "gap-cpu.json").read_text())
    lines = [
        "| what is set | actor really computes in | rollout | mean \\|Δ log p\\|, nats [95%] | k3, nats [95%] |",
        "|---|---|---|---|---|",
    ]
    for name, label in _ROWS.items():
        pair = result["pairs"][name]
        dtypes = (pair["training_autocast"], pair["rollout_dtype"])
        train, rollout = (dtype.removeprefix("torch.") for dtype in dtypes)
        gap, k3 = _interval(pair["mean_abs_dlogp"], ".2e"), _interval(pair["k3"], ".1e")
        lines.append(f"| {label} | {train} | {rollout} | {gap} | {k3} |")
    factor = result["factors"]["bf16 over fp16"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"BF16 over FP16: {_interval(factor['mean_abs_dlogp'], '.1f')} in |Δ log p|, "
        f"{_interval(factor['k3'], '.0f')} in k3. {result['tokens']:,} tokens with an entropy of at least "
        f"{result['entropy_floor_nats']} nats out of {result['answer_tokens']:,} in {result['answers']:,} answers "
        f"(mean entropy {result['mean_entropy_nats']:.2f} "
        f"nats); {result['date']}, {result['machine']}; {versions}.",
    ]
    return "\n".join(lines)


def _accuracy(run: dict, when: str) -> str:
    return f"{run[f'accuracy_{when}']:.1%} ± {run[f'accuracy_{when}_standard_error']:.1%}"


def quickstart_table() -> str:
    """Validation accuracy before and after, from ``quickstart-cpu.json``."""
    result = json.loads((RESULTS / "quickstart-cpu.json").read_text())
    lines = [
        "| precision | seed | validation accuracy before | after 30 steps | mean \\|Δ log p\\| | mean \\|π − μ\\| "
        "| skipped | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        before, after = (_accuracy(run, when) for when in ("before", "after"))
        skipped = "-" if run["skipped_steps"] is None else run["skipped_steps"]
        minutes, seconds = divmod(round(run["seconds"]), 60)
        lines.append(
            f"| {run['precision']} | {run['seed']} | {before} | {after} | {run['log_prob_gap_mean']:.2e} | "
            f"{run['prob_gap_mean']:.2e} | {skipped} | {minutes} min {seconds:02d} s |"
        )
    return "\n".join([*lines, "", f"{result['date']}, {result['machine']}."])


def hooks_table() -> str:
    """Every hook, from its record."""
    lines = ["| hook | wraps | verl | why | what it changes | until |", "|---|---|---|---|---|---|"]
    for hook in HOOKS:
        target = hook.target.qualname or hook.target.module
        why = f"{hook.why} ({hook.upstream})" if hook.upstream else hook.why
        cells = (f"`{hook.name}`", f"`{target}`", _releases(hook), why, hook.how, hook.until)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _releases(hook: Hook) -> str:
    releases = [version for version in SUPPORTED_VERL if hook.is_for(version)]
    return "all" if len(releases) == len(SUPPORTED_VERL) else ", ".join(releases)


def versions_table() -> str:
    """What is tested with which release: the supported ones, and the pins of the extra ``cpu``."""
    newest = SUPPORTED_VERL[-1]
    lines = [
        "| verl | targets of all hooks | FSDP engine | trainer end to end | source patch |",
        "|---|---|---|---|---|",
    ]
    for version in reversed(SUPPORTED_VERL):
        trainer = "yes" if version == newest else "no"
        patch = "applied, engine, trainer" if version == newest else "applied, imported"
        lines.append(f"| {version} | yes | yes | {trainer} | {patch} |")
    extra = re.search(r"^cpu = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    pins = re.findall(r'"([\w.-]+)==([\w.]+)"', extra)
    return "\n".join(
        [*lines, "", f"With {', '.join(f'{name} {version}' for name, version in pins if name != 'verl')}."]
    )


def scaler_table() -> str:
    """What the scaler costs against verl's own, from ``scaler-cost-cpu.json``."""
    result = json.loads((RESULTS / "scaler-cost-cpu.json").read_text())
    update = result["update"]
    low, high = update["ratio_quartiles"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "verl"))
    return "\n".join(
        [
            "| scaler | operations in an update | reads from the device |",
            "|---|---|---|",
            *(
                f"| {side} | {counts['operations']:,} | {counts['reads']} |"
                for side, counts in result["counts"].items()
            ),
            "",
            f"Ratio of the time of an update: {update['ratio']:.3f} [quartiles {low:.3f}, {high:.3f}], of noise "
            f"{update['ratio_of_noise']:.3f}; {update['pairs']} pairs, {result['date']}, {result['machine']}; "
            f"{versions}.",
        ]
    )


def _bounds(value: dict, form: str) -> str:
    """As :func:`_interval`, of what ``verl-fp16 mismatch`` writes."""
    return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


_SEQUENCE_KL = ("seq_kl", "sequence KL, nats", ".2g")
_OF_A_GAP = (("log_prob_abs_diff_mean", "mean \\|Δ log p\\|, nats", ".2e"), ("k3", "k3, nats", ".1e"), _SEQUENCE_KL)
_SLOPE = ("slope_per_1k_tokens", "slope of log(π/μ) per 1,000 tokens", "+.2g")


def _gap_rows(measurements: dict, statistics: tuple) -> list[str]:
    lines = [
        f"| training/rollout | {' | '.join(label for _, label, _ in statistics)} |",
        "|---" * (len(statistics) + 1) + "|",
    ]
    for name, one in measurements.items():
        cells = [_bounds(one["intervals"][key], form) for key, _, form in statistics]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _made(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['date']}, {result['machine']}; {versions}."


def compare_table() -> str:
    """Both quickstarts, and the gap on the same tokens, from ``compare-cpu.json``."""
    result = json.loads((RESULTS / "compare-cpu.json").read_text())
    lines = [
        "| precision | validation accuracy before | after | mean \\|Δ log p\\| of the run | skipped |",
        "|---|---|---|---|---|",
    ]
    for name, run in result["runs"].items():
        skipped = "-" if run["skipped_steps"] is None else run["skipped_steps"]
        lines.append(
            f"| {name} | {_accuracy(run, 'before')} | {_accuracy(run, 'after')} | {run['log_prob_gap_mean']:.2e} | "
            f"{skipped} |"
        )
    first, lengths = next(iter(result["mismatch"].values())), result["lengths"].replace(":", " to ")
    factors = result["factors"]
    bf16, fp16 = (0 if _spans_zero(result["mismatch"][name]) else 1 for name in ("bf16", "fp16"))
    told = {
        (1, 0): "The slope's interval contains 0 for FP16 and not for BF16.",
        (0, 0): "Both slopes' intervals contain 0: a model of this size does not show the slope that the paper found.",
        (1, 1): "Neither slope's interval contains 0.",
        (0, 1): "The slope's interval contains 0 for BF16 and not for FP16.",
    }[bf16, fp16]
    return "\n".join(
        [
            *lines,
            "",
            f"The same {first['tokens']:,} tokens, {first['sequences']} answers of {lengths} tokens, for both:",
            "",
            *_gap_rows(result["mismatch"], (*_OF_A_GAP, _SLOPE)),
            "",
            f"BF16 over FP16: {_bounds(factors['log_prob_abs_diff_mean'], '.1f')} in |Δ log p|, "
            f"{_bounds(factors['k3'], '.0f')} in k3{_of_sequences(factors['seq_kl'])}. {told} {_made(result)}",
        ]
    )


def _of_sequences(factor: dict) -> str:
    """Nothing where FP16's may be 0, so that there is no factor."""
    if factor["value"] is None:
        return ""
    return f", {_bounds(factor, '.0f')} in the sequence KL (the paper, of a model of 1.5 B parameters: 24)"


def _spans_zero(one: dict) -> bool:
    slope = one["intervals"]["slope_per_1k_tokens"]
    return slope["low"] <= 0 <= slope["high"]


def ladder_table() -> str:
    """A row for each cause, from ``ladder-cpu.json``."""
    result = json.loads((RESULTS / "ladder-cpu.json").read_text())
    return "\n".join([*_gap_rows(result["mismatch"], _OF_A_GAP), "", f"{_tokens(result)} {_made(result)}"])


def _tokens(result: dict) -> str:
    first = next(iter(result["mismatch"].values()))
    return f"{first['tokens']:,} tokens of {first['sequences']} answers, {result['lengths'].replace(':', ' to ')} each;"


def throughput_table() -> str:
    """What ``verl-fp16 mismatch`` costs beside its engines, from ``gap_throughput-cpu.json``."""
    result = json.loads((RESULTS / "gap_throughput-cpu.json").read_text())
    rows = (
        ("sampling, of vLLM alone", result["sampling"]["vLLM"]),
        ("scoring, of verl's FSDP engine alone", result["scoring"]["engine"]),
        ("scoring, of the FSDP module's forward alone", result["scoring"]["module"]),
    )
    lines = ["| stage | tokens/s, ratio: median [lowest, highest] | answer tokens/s |", "|---|---|---|"]
    for name, row in rows:
        ratio = f"{row['ratio']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]"
        lines.append(f"| {name} | {ratio} | {row['answer_tokens_per_s']:,.0f} |")
    return "\n".join([*lines, "", f"{rows[0][1]['pairs']} pairs; {_made(result)}"])


def preflight_memory_table() -> str:
    """The memory of ``verl-fp16 preflight``, from ``preflight-memory-cpu.json``."""
    result = json.loads((RESULTS / "preflight-memory-cpu.json").read_text())
    shard = result["largest_shard_bytes"]
    lines = ["| preflight | most memory above the imports | of the largest shard | time |", "|---|---|---|---|"]
    for label, key in (("`--weights-only`", "weights_only"), ("both halves", "both_halves")):
        row = result[key]
        lines.append(
            f"| {label} | {row['above_imports'] / 1e6:.0f} MB | {row['above_imports'] / shard:.2f} | "
            f"{row['seconds']:.0f} s |"
        )
    checkpoint = f"A checkpoint of {result['checkpoint_bytes'] / 1e9:.1f} GB in {result['shards']} shards"
    return "\n".join([*lines, "", f"{checkpoint}, the largest of {shard / 1e6:.0f} MB; {_made(result)}"])


TABLES = {
    README: {
        "gap": gap_table,
        "quickstart": quickstart_table,
        "compare": compare_table,
        "scaler": scaler_table,
        "hooks": hooks_table,
        "versions": versions_table,
        "gpu": gpu_page.gpu_table,
    },
    GAP: {"ladder": ladder_table, "throughput": throughput_table},
    PREFLIGHT: {"memory": preflight_memory_table},
    recipes_page.RECIPES / "README.md": {
        "paper": recipes_page.paper_table,
        "everyday": recipes_page.everyday_table,
        "cpu": recipes_page.cpu_table,
        "measured": recipes_page.measured_table,
    },
}


def render(page: Path) -> str:
    """A page's text with every generated block replaced by what the result files say.

    Raises:
        ValueError: a block is missing.
    """
    text = page.read_text()
    for name, table in TABLES[page].items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        block = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
        if not block.search(text):
            raise ValueError(f"{page.name} has no block {begin} ... {end}")
        content = f"{begin}\n{table()}\n{end}"
        text = block.sub(lambda _, content=content: content, text)
    return text


def main() -> int:
    stale = {page: text for page in TABLES if (text := render(page)) != page.read_text()}
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page.name} is stale: run scripts/readme_tables.py", file=sys.stderr)
        return 1 if stale else 0
    for page, text in stale.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
