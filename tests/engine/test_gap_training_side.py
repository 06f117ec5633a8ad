"""The training side of ``verl-fp16 mismatch``: verl's FSDP engine in its own process, against transformers in FP32."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_fp16.gap_report import driver, folder
from verl_fp16.gap_report.errors import GapError
from verl_fp16.gap_report.folder import WorkFolder

PLAIN = {"strategy": "fsdp2", "attention": None, "remove_padding": True, "tokens_at_once": 60}
ASKED = {
    # name: (precision, FP32 head, temperature, settings)
    "fp32": ("fp32", False, 1.0, PLAIN),
    "fp32 padded": ("fp32", False, 1.0, {**PLAIN, "remove_padding": False}),
    "fp32 fsdp1": ("fp32", False, 1.0, {**PLAIN, "strategy": "fsdp"}),
    "fp32 cool": ("fp32", False, 0.6, PLAIN),
    "fp16": ("fp16", False, 1.0, PLAIN),
    "bf16": ("bf16", False, 1.0, PLAIN),
    "bf16 head": ("bf16", True, 1.0, PLAIN),
}
AT_A_TIME = 2


def answers() -> dict[str, list]:
    random.seed(0)
    prompts = [[random.randrange(256) for _ in range(random.randint(1, 9))] for _ in range(24)]
    texts = [[random.randrange(256) for _ in range(random.randint(1, 40))] for _ in prompts]
    log_mu = [[0.0] * len(text) for text in texts]
    return {"sample": range(len(texts)), "prompt": prompts, "answer": texts, "log_mu": log_mu, "cut": [False] * 24}


@pytest.fixture(scope="module")
def scores(sharp_model, tmp_path_factory) -> dict[str, tuple[list[np.ndarray], dict]]:
    def score(name: str) -> tuple[list[np.ndarray], dict]:
        precision, head, temperature, settings = ASKED[name]
        work = WorkFolder(tmp_path_factory.mktemp("work"), {"seed": 0})
        folder.write_part(work.tokens("x") / "part-00000.parquet", answers(), folder.tokens_schema())
        target = work.scores("training", "y", "x")
        side = {"precision": precision, "fp32_head": head, "temperature": temperature}
        spec = {"stage": "score_training", "model": str(sharp_model), "work": str(work.path), "total": 24}
        told = []
        spec |= {"side": side, "slug": "y", "tokens": "x", "settings": settings}
        driver._stage(work, target, spec, name, lambda *what: told.append(what))
        done = [number for _, number, _ in told]
        assert done == sorted(done) and done[-1] == 24 and len(set(done)) > 5, "forward by forward"
        (part,) = map(folder.read_part, folder.parts(target))
        assert part["sample"] == list(range(24))
        return [np.array(row) for row in part["log_prob"]], json.loads((target / driver.FOUND).read_text())

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return dict(zip(ASKED, pool.map(score, ASKED), strict=True))


@pytest.fixture(scope="module")
def logits(sharp_model) -> list[torch.Tensor]:
    """Of each answer's tokens, in float64 of an FP32 forward, sequence by sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sharp_model, dtype=torch.float32).eval()
    columns = answers()
    found = []
    with torch.no_grad():
        for prompt, answer in zip(columns["prompt"], columns["answer"], strict=True):
            found.append(model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double())
    return found


def reference(logits: list[torch.Tensor], temperature: float = 1.0) -> list[np.ndarray]:
    texts = answers()["answer"]
    rows = zip(logits, texts, strict=True)
    return [
        (of / temperature).log_softmax(-1).gather(-1, torch.tensor(text)[:, None])[:, 0].numpy() for of, text in rows
    ]


def gaps(found: list[np.ndarray], expected: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a - b for a, b in zip(found, expected, strict=True)])


@pytest.mark.parametrize("name", ("fp32", "fp32 padded", "fp32 fsdp1"))
def test_fp32_is_what_transformers_says_of_the_same_tokens(scores, logits, name):
    assert abs(gaps(scores[name][0], reference(logits))).max() < 1e-4


def test_logits_are_divided_by_the_temperature(scores, logits):
    assert abs(gaps(scores["fp32 cool"][0], reference(logits, 0.6))).max() < 1e-4
    assert abs(gaps(scores["fp32 cool"][0], reference(logits))).max() > 0.1


def test_precisions_are_really_computed_in(scores, logits):
    sizes = {name: abs(gaps(scores[name][0], reference(logits))).mean() for name in ("fp32", "fp16", "bf16")}
    assert 5 < sizes["bf16"] / sizes["fp16"] < 13 and sizes["fp16"] > 30 * sizes["fp32"]
    for name, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")):
        assert scores[name][1] == {"autocast": dtype, "weights": [dtype]}


def test_an_fp32_head_takes_the_rounding_of_logits_away_and_nothing_else(scores, logits):
    taken = abs(gaps(scores["bf16 head"][0], scores["bf16"][0])).mean()
    # BF16 rounds a number by 2^-10 of it on average; a log-probability has the rounding of its logit and of the others.
    assert 2**-11 < taken / torch.cat(logits).abs().mean().item() < 2**-8
    with_head, without = (abs(gaps(scores[name][0], reference(logits))).mean() for name in ("bf16 head", "bf16"))
    assert with_head < without
    assert scores["bf16 head"][1]["weights"] == ["bfloat16"], "the weights are those of the precision"


def test_a_model_that_the_engine_does_not_run_is_one_line(tmp_path, sharp_model):
    work = WorkFolder(tmp_path / "work", {"seed": 0})
    spec = {"stage": "score_training", "model": str(sharp_model), "work": str(work.path), "total": 1}
    side = {"precision": "fp16", "fp32_head": False, "temperature": 1.0}
    spec |= {"side": side, "slug": "y", "tokens": "x", "settings": {**PLAIN, "attention": "none_such"}}
    with pytest.raises(GapError, match="verl's fsdp2 engine does not run .* in float16: .*none_such"):
        driver._stage(work, Path(work.scores("training", "y", "x")), spec, "scoring", lambda *told: None)
