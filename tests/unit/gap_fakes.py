"""Both sides of the gap without vLLM and FSDP: log-probabilities by a rule, so that every number can be foretold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from verl_fp16.gap_report import driver, stage
from verl_fp16.sampling import Answer
from verl_fp16.whole_files import write_whole

ERROR = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 0.0}


def log_prob(tokens, dtype: str, salt: int) -> np.ndarray:
    """What a side says of an answer: the token's own value, and the rounding of its dtype."""
    tokens = np.asarray(tokens)
    noise = np.array([np.random.default_rng([int(t), p, salt]).standard_normal() for p, t in enumerate(tokens)])
    return (-1.0 - (tokens % 7) / 4 + ERROR[dtype] * noise).astype(np.float32)


class FakeSampler:
    """As :class:`verl_fp16.sampling.Sampler`; answers come in another order than their requests."""

    max_model_len = 64
    made: list[dict] = []
    stop_after: int | None = None

    def __init__(self, model, *, dtype, max_tokens, **settings) -> None:
        self.dtype, self.max_tokens = dtype, max_tokens
        FakeSampler.made.append({"model": Path(model), "dtype": dtype, **settings})

    def weight_dtypes(self) -> set[str]:
        return {self.dtype}

    def room(self, tokens) -> int:
        return self.max_model_len - len(tokens) - self.max_tokens

    def sample(self, requests):
        waiting = sorted(requests, key=lambda request: -request.seed)
        for number, request in enumerate(waiting):
            if number == FakeSampler.stop_after:
                raise KeyboardInterrupt
            random = np.random.default_rng(request.seed)
            length = request.length or int(random.integers(1, self.max_tokens + 1))
            tokens = random.integers(0, 200, length).tolist()
            values = [float(value) for value in log_prob(tokens, self.dtype, 1)]
            yield request, [Answer(tokens, "", length == self.max_tokens, values)]

    def score(self, texts):
        for text in reversed(list(texts)):
            yield text, [float(value) for value in log_prob(text.tokens[text.start :], self.dtype, 1)]


class FakeTrainingSide:
    made: list[tuple] = []

    def __init__(self, model, dtype, fp32_head=False, temperature=1.0, **settings) -> None:
        self.dtype = dtype
        FakeTrainingSide.made.append((dtype, fp32_head, temperature, settings))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def found(self):
        return {"autocast": self.dtype, "weights": [self.dtype]}

    def log_probs(self, rows):
        for _, answer in rows:
            yield [log_prob(answer, self.dtype, 2)]


def in_this_process(work, target, spec, name, tell) -> None:
    """As ``driver._stage``, without a process."""
    target.mkdir(parents=True, exist_ok=True)

    def told(**said) -> None:
        if "found" in said:
            write_whole(target / driver.FOUND, json.dumps(said["found"]).encode())
        if said.get("speed"):
            write_whole(target / driver.SPEED, json.dumps(said["speed"]).encode())
        if "done" in said:
            tell(name, said["done"], said["of"])

    spec = json.loads(json.dumps(spec))
    stage.STAGES[spec.pop("stage")](told, **spec)


def put_in_place(monkeypatch) -> None:
    monkeypatch.setattr("verl_fp16.sampling.Sampler", FakeSampler)
    monkeypatch.setattr("verl_fp16.gap_report.training_side.TrainingSide", FakeTrainingSide)
    monkeypatch.setattr(driver, "_stage", in_this_process)
    monkeypatch.setattr(FakeSampler, "made", [])
    monkeypatch.setattr(FakeSampler, "stop_after", None)
    monkeypatch.setattr(FakeTrainingSide, "made", [])
