"""The tables of recipes/README.md: what each recipe is for, what it runs on, the paper's numbers, and what was run.

What was run is read from the files under benchmarks/results; what a recipe is made of, from its defaults list.
``scripts/readme_tables.py`` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_fp16.recipe_files import Recipe, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Paper:
    """What the paper says of a recipe's experiment.

    Args:
        what: the experiment.
        bf16: what it came to in BF16.
        fp16: what it came to in FP16.
    """

    what: str
    bf16: str = "-"
    fp16: str = "-"


# From arXiv 2510.26788, text and figures; nothing of it was reproduced here.
PAPER = {
    "sanity_grpo": Paper("sanity test, GRPO", "0.73, then collapse", "0.98"),
    "sanity_grpo_token_tis": Paper("sanity test, GRPO-Token-TIS", "0.82, then collapse", "0.98"),
    "sanity_grpo_seq_mis": Paper("sanity test, GRPO-Seq-MIS", "0.945, slow", "0.98"),
    "sanity_gspo": Paper("sanity test, GSPO", "0.84", "0.98"),
    "sanity_pg_seq_is": Paper("sanity test, PG-Seq-IS", "0.78", "0.97"),
    "sanity_pg_seq_tis": Paper("sanity test, PG-Seq-TIS"),
    "sanity_pg_seq_mis": Paper("sanity test, PG-Seq-MIS", "0.945", "0.985"),
    "sanity_pg_token_is": Paper("sanity test, PG-Token-IS"),
    "precision_ablation": Paper(
        "precision ablation: five pairs of dtypes",
        "BF16/BF16 collapses, later with an FP16 rollout; BF16/FP32 is stable, its rollout about 3 times slower",
        "FP16/FP16: lowest mismatch, about 1.0",
    ),
    "octothinker_grpo": Paper("OctoThinker-3B, GRPO, MATH", "0.53, gone after about 150 steps", "0.61"),
    "lora_grpo_token_tis": Paper("Qwen2.5-Math-1.5B, LoRA", "0.77, falls to 0.28 after about 610 steps", "0.78"),
    "moe_grpo_seq_mis": Paper("Qwen3-30B-A3B, GRPO-Seq-MIS", "0.65", "0.70"),
    "moe_grpo_token_tis": Paper("Qwen3-30B-A3B, GRPO-Token-TIS", "0.68", "0.75"),
    "moe_pg_seq_tis": Paper("Qwen3-30B-A3B, PG-Seq-TIS", "0.69", "0.70"),
    "dapo_14b": Paper("Qwen3-14B, DAPO, at step 80", "0.775", "0.80"),
}
EVERYDAY = ("gsm8k_grpo", "gsm8k_ppo", "two_nodes")


def _result(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else {}


def ran_on_a_cpu() -> dict[str, int]:
    """Recipe -> the most steps that it was run for, end to end on a CPU, by the result files."""
    found: dict[str, int] = {}
    result = _result("recipes-cpu.json")
    for run in (*result.get("compared", ()), *result.get("others", ())):
        found[run["recipe"]] = max(run["steps"], found.get(run["recipe"], 0))
    for run in _result("quickstart-cpu.json").get("runs", ()):
        found["quickstart"] = max(run["steps"], found.get("quickstart", 0))
    return found


def ran_on_a_gpu() -> dict[str, str]:
    """Recipe -> the GPU that it was run on end to end, by the result files."""
    runs = _result("recipes-gpu.json").get("runs", ())
    return {run["recipe"]: run["gpu"] for run in runs}


def label(recipe: str) -> str:
    """What was done with a recipe."""
    if recipe in (on_gpu := ran_on_a_gpu()):
        return f"run end to end on {on_gpu[recipe]}"
    if recipe in (on_cpu := ran_on_a_cpu()):
        return f"run end to end on a CPU, {on_cpu[recipe]} steps"
    return "composed only"


def paper_table() -> str:
    """A row for each recipe of the paper."""
    head = ("recipe", "what it is of the paper", "the paper, BF16", "the paper, FP16", "hardware", "here")
    return _table(head, (_paper_row(name, paper) for name, paper in PAPER.items()))


def _paper_row(name: str, paper: Paper) -> tuple[str, ...]:
    return (f"`{name}`", paper.what, paper.bf16, paper.fp16, shipped_recipes()[name].hardware, label(name))


def everyday_table() -> str:
    """A row for each recipe that begins something of one's own."""
    head = ("recipe", "what it is", "hardware", "here")
    return _table(head, (_own_row(shipped_recipes()[name]) for name in EVERYDAY))


def _own_row(recipe: Recipe) -> tuple[str, ...]:
    return (f"`{recipe.name}`", recipe.summary, recipe.hardware, label(recipe.name))


def cpu_table() -> str:
    """A row for each recipe for a machine without a GPU."""
    recipes = (recipe for recipe in shipped_recipes().values() if recipe.hardware == "CPU")
    return _table(
        ("recipe", "what it is", "here"), ((f"`{one.name}`", one.summary, label(one.name)) for one in recipes)
    )


def measured_table() -> str:
    """Training accuracy, gap and skipped updates of the compared runs, from ``recipes-cpu.json``."""
    result = _result("recipes-cpu.json")
    if not result:
        return "Not measured yet: `python benchmarks/recipes_cpu.py --record`."
    runs = {(run["recipe"], run["precision"]): run for run in result["compared"]}
    last, questions = result["last_steps"], result["sanity_set"]
    head = (
        "recipe",
        "precision",
        f"training accuracy, steps 1 to {last}",
        f"the last {last}",
        "mean \\|Δ log p\\|, nats",
        "skipped",
    )
    rows = []
    for (recipe, precision), run in runs.items():
        skipped = "-" if run["skipped_steps"] is None else str(run["skipped_steps"])
        end = f"{run['accuracy_last']:.1%} ± {run['accuracy_last_standard_error']:.1%}"
        rows.append((f"`{recipe}`", precision, f"{run['accuracy_first']:.1%}", end, f"{run['gap_mean']:.2e}", skipped))
    steps = next(iter(runs.values()))["steps"]
    made = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            _table(head, rows),
            "",
            *_verdicts(runs),
            "",
            f"{steps} steps each on {questions['kept']} of {questions['questions']} questions, one seed; ± is the "
            f"standard error over those steps. `{result['command']}`; {result['date']}, {result['machine']}; {made}.",
        ]
    )


def _verdicts(runs: Mapping[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """What a table does not say by itself: by what factor the gap differs, and whether the accuracy does."""
    for recipe in dict.fromkeys(name for name, _ in runs):
        bf16, fp16 = runs[recipe, "bf16"], runs[recipe, "fp16"]
        gained = fp16["accuracy_last"] - bf16["accuracy_last"]
        error = (fp16["accuracy_last_standard_error"] ** 2 + bf16["accuracy_last_standard_error"] ** 2) ** 0.5
        verdict = "FP16 is ahead" if gained > 2 * error else "BF16 is ahead" if -gained > 2 * error else "no difference"
        yield (
            f"- `{recipe}`: the gap is {bf16['gap_mean'] / fp16['gap_mean']:.1f} times smaller in FP16; in accuracy "
            f"FP16 minus BF16 is {100 * gained:+.1f} ± {100 * error:.1f} points: {verdict} at this scale."
        )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
