"""What the trainer's process asks of an FSDP rank around a sync; called through Ray, with one of verl's actors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_fp16.readback.rank import engines_of

# Plain words, which any tokenizer takes; enough tokens for a mean, few enough to be free.
PROBE_TEXT = "The weather in the north was cold, and 12 + 7 = 19. She said that nobody would have believed it before."
PROBE_TOKENS = 32

# Instead of what was learned: what this rank was told before by the same manager.
KEEP = "keep"


def sender_of(engine: Any) -> Any:
    """The engine's :class:`~verl_fp16.weight_sync.sender.WeightSender`, made with the first call; None without one.

    There is one where the engine's weights go into a rollout: in the actor, with the flag.
    """
    sender = getattr(engine, "_verl_fp16_sender", None)
    settings = sync_settings_of(engine)
    if sender is None and settings is not None:
        import torch

        from verl_fp16.weight_sync.sender import WeightSender

        sender = WeightSender(getattr(torch, settings["dtype"]), settings["on_overflow"])
        engine._verl_fp16_sender = sender
    return sender


def sync_settings_of(engine: Any) -> Any:
    """What rode to the actor in ``mixed_precision.verl_fp16.weight_sync``; None for other roles or without the flag."""
    mixed_precision = getattr(getattr(engine, "engine_config", None), "mixed_precision", None)
    ours = mixed_precision.get("verl_fp16") if mixed_precision is not None else None
    return ours["weight_sync"] if ours is not None and ours["role"] == "actor" else None


def prepare_sync(
    worker: Any, manager: str, learned: Mapping[str, list[str]] | str | None, digests: bool
) -> dict[str, Any] | None:
    """Get the rank ready for a sync.

    Args:
        manager: whose sync it is; each of verl's checkpoint managers has a rollout of its own.
        learned: fields of :class:`Learned`, or None, or :data:`KEEP`.
        digests: whether the stream is to be digested.

    Returns:
        the settings of the sync with the dtypes of both sides; None where this rank's weights are not ours to send.
    """
    engine = _actor_engine(worker)
    sender = sender_of(engine)
    if sender is None:
        return None
    from verl_fp16.weight_sync.sender import Learned

    told = engine.__dict__.setdefault("_verl_fp16_learned", {})
    if learned != KEEP:
        told[manager] = None if learned is None else Learned(*(frozenset(learned[key]) for key in ("narrow", "exempt")))
    sender.learn(told.get(manager))
    sender.prepare(digests=digests)
    ours = engine.engine_config.mixed_precision["verl_fp16"]
    return {**ours["weight_sync"], "train_dtype": ours["dtype"]}


def report_sync(worker: Any) -> dict[str, Any]:
    """What the rank sent; see :meth:`WeightSender.report`."""
    return sender_of(_actor_engine(worker)).report()


def probe_actor(worker: Any) -> dict[str, list]:
    """The probe's ``tokens``, and ``log_probs`` of all but the first as the actor computes them, in nats."""
    from verl_fp16.standalone import teacher_forced_log_probs

    engine = _actor_engine(worker)
    tokens = list(engine.model_config.tokenizer.encode(PROBE_TEXT, add_special_tokens=False))[:PROBE_TOKENS]
    (log_probs,) = teacher_forced_log_probs(
        engine,
        [tokens],
        1,
        use_remove_padding=bool(engine.engine_config.use_remove_padding),
        use_fused_kernels=bool(engine.model_config.use_fused_kernels),
    )
    return {"tokens": tokens, "log_probs": log_probs.tolist()}


def _actor_engine(worker: Any) -> Any:
    return next((engine for role, engine in engines_of(worker) if role == "actor"), None)
