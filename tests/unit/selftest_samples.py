"""Facts of a self-test in which everything is as it should be, for tests that plant one fault each."""

from __future__ import annotations

from typing import Any

GPUS = 2


def doctor() -> dict[str, Any]:
    ok = {"status": "ok", "wanted": "", "fix": ""}
    checks = [{"name": "verl", "found": "0.9.1", **ok}, {"name": "hook engine.loss_scaler", "found": "applied", **ok}]
    return {"device": "cpu", "checks": checks}


def model() -> dict[str, Any]:
    return {"parameters": 1_300_000, "longest": 7, "theirs": None}


def scaler(scale: float, **changed: Any) -> dict[str, Any]:
    return {"format": 1, "scale": scale, "growth_tracker": 2, "skipped_total": 1, **changed}


def update(number: int) -> dict[str, Any]:
    """Of the 7; the fourth one is skipped."""
    skipped, scale = number == 4, 1024.0 if number < 4 else 512.0
    return {
        "loss": 5.0 - 0.5 * number,
        "grad_norm": None if skipped else 2.0,
        "digest": f"after {3 if skipped else number}",
        "skipped": skipped,
        "scale": scale,
        "scaler": scaler(scale),
    }


def engine() -> dict[str, Any]:
    return {name: _strategy(name) for name in ("fsdp", "fsdp2")}


def _strategy(name: str) -> dict[str, Any]:
    state = {key: value for key, value in update(6).items() if key not in ("loss", "grad_norm")}
    read_back = {"autocast": "float16", "fsdp_param": ["float16"], "master": ["float32"], "scaler": "LossScaler"}
    first = {"updates": [update(n) for n in range(1, 7)], "read_back": read_back, "saved": state, "next": update(7)}
    return {
        "device": "cpu",
        "ranks": GPUS,
        "seconds": 20.0,
        "first": [_copy(first) for _ in range(GPUS)],
        "resumed": [_copy({"loaded": state, "next": update(7)}) for _ in range(GPUS)],
    }


def _copy(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def step() -> dict[str, float]:
    return {
        "mismatch/train_dtype/float16": 1.0,
        "mismatch/rollout_dtype/float16": 1.0,
        "mismatch/log_prob_abs_diff_mean": 5e-4,
        "mismatch/k3": 8e-7,
        "actor/skipped_steps": 0.0,
        "actor/loss_scale": 65536.0,
        "sync/audit_ok": 1.0,
        "sync/probe_abs_diff": 3e-4,
    }


def process(who: str, **roles: dict[str, Any]) -> dict[str, Any]:
    return {"who": who, "roles": list(roles), "report": {"rank": 0, "roles": roles}, "failure": "", "where": ""}


def run() -> dict[str, Any]:
    rollout = {"model_dtype": "float16", "parameters": ["float16", "float32"]}
    actor = {"autocast": "float16", "fsdp_param": ["float16"]}
    actors = [process(f"training worker {rank}", actor=actor) for rank in range(GPUS)]
    rollouts = [process(f"rollout replica {number}, worker 0", rollout=rollout) for number in range(GPUS)]
    facts = {
        "cause": None,
        "gpus": GPUS,
        "theirs": False,
        "steps": {"1": step(), "2": step(), "3": step()},
        "read_back": {
            "differences": [],
            "processes": [process("trainer"), *actors, *rollouts],
        },
        "skips": [],
    }
    return _copy(facts)


def skip(**changed: Any) -> dict[str, Any]:
    return {
        "update": 1,
        "kind": "gradient",
        "scale": 65536.0,
        "gradients": [{"parameter": "lm_head.weight"}],
        "modules": {},
        **changed,
    }


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def measurement(name: str, error: float) -> dict[str, Any]:
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[name]
    return {
        "log_prob_abs_diff_mean": interval(error),
        "k3": interval(error**2),
        "tokens": 4000,
        "found": {"rollout": [dtype], "training": {"autocast": dtype, "weights": [dtype]}},
    }


def gap() -> dict[str, Any]:
    speed = {"tokens": 4000, "seconds": 2.0, "timed_s": 5.0}
    speeds = {"bf16": speed, "fp16": speed}
    return {
        "device": "gpu",
        "token_loop": False,
        "measurements": {"bf16": measurement("bf16", 4e-3), "fp16": measurement("fp16", 5e-4)},
        "speeds": {"rollout": _copy(speeds), "training": _copy(speeds)},
    }


ALL = {"doctor": doctor, "model": model, "engine": engine, "run": run, "gap": gap}
