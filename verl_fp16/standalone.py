"""One of verl's FSDP engines outside a trainer: for tests, benchmarks and measurements on fixed tokens.

What runs is verl's engine with verl's configuration classes, built as verl's ``TrainingWorker`` builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from verl_fp16.weight_sync_settings import WeightSyncSettings


def mixed_precision(
    dtype: str,
    *,
    role: str = "actor",
    loss_scale: dict[str, Any] | None = None,
    folder: str | None = None,
    fault_injection: Sequence[dict[str, Any]] = (),
    weight_sync: dict[str, Any] | None = None,
    bypass_mode: bool = False,
) -> dict[str, Any]:
    """What the flag puts into a role's ``fsdp_config.mixed_precision``.

    Args:
        dtype: float16, bfloat16 or float32.
        role: actor, ref or critic.
        loss_scale: settings of the loss scaler; defaults where left out.
        folder: the run's folder, where skipped updates are recorded.
        fault_injection: see :mod:`verl_fp16.fault_injection`.
        weight_sync: the rollout's dtype, ``dtype`` where left out, and settings of the sync; defaults where left out.
        bypass_mode: whether the rollout's log-probabilities are taken for those of the old policy.
    """
    return {
        "param_dtype": dtype,
        "reduce_dtype": "fp32",
        "buffer_dtype": "fp32",
        "verl_fp16": {
            "role": role,
            "dtype": dtype,
            "loss_scale": loss_scale or {},
            "folder": folder,
            "bypass_mode": bypass_mode,
            "fault_injection": list(fault_injection),
            "weight_sync": {"dtype": dtype, **asdict(WeightSyncSettings()), **(weight_sync or {})},
        },
    }


def build_engine(
    model_path: str,
    *,
    precision: dict[str, Any] | None,
    strategy: str = "fsdp2",
    model_type: str = "language_model",
    forward_only: bool = False,
    use_remove_padding: bool = False,
    lora_rank: int = 0,
    attention: str = "sdpa",
    optimizer: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> Any:
    """Build and initialize an engine in a process whose default process group exists.

    Args:
        model_path: folder of a Hugging Face model with its tokenizer.
        precision: the role's ``mixed_precision``; None is verl's default (BF16).
        strategy: fsdp or fsdp2.
        model_type: language_model (actor, reference policy) or value_model (critic).
        attention: the model's attn_implementation.
        optimizer: fields of verl's ``FSDPOptimizerConfig``.
        engine: fields of verl's ``FSDPEngineConfig``; they win over what is set here.
        model: further fields of verl's ``HFModelConfig``.
        checkpoint: fields of verl's ``CheckpointConfig``.
    """
    import verl.workers.engine  # noqa: F401  registers the engines
    from verl.workers.engine.base import EngineRegistry

    model_config = HFModelConfig(
        path=str(model_path),
        use_remove_padding=use_remove_padding,
        enable_gradient_checkpointing=False,
        lora_rank=lora_rank,
        override_config={"attn_implementation": attention},
        **(model or {}),
    )
    model_config.model_type = model_type
    engine_config = FSDPEngineConfig(
        strategy=strategy,
        mixed_precision=precision,
        forward_only=forward_only,
        **{"use_torch_compile": False, "wrap_policy": {"min_num_params": 0}, **(engine or {})},
    )
    optimizer_config = FSDPOptimizerConfig(**{"lr": 1e-3, "total_training_steps": 1000, **(optimizer or {})})
    built = EngineRegistry.new(
        model_type=model_type,
        backend=strategy,
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=None if forward_only else optimizer_config,
        checkpoint_config=CheckpointConfig(**(checkpoint or {})),
    )
    built.initialize()
    return built


def make_batch(
    sequences: Sequence[Sequence[int]],
    *,
    use_remove_padding: bool = False,
    use_fused_kernels: bool = False,
    micro_batch_size: int | None = None,
    last_of_step: bool = True,
    temperature: float = 1.0,
    **tensors: torch.Tensor,
) -> TensorDict:
    """A batch as verl's workers hand it to an engine: jagged ``input_ids``, all tokens in the loss."""
    ids = torch.nested.as_nested_tensor([torch.tensor(s) for s in sequences], layout=torch.jagged)
    positions = torch.nested.as_nested_tensor([torch.arange(len(s)) for s in sequences], layout=torch.jagged)
    mask = torch.nested.as_nested_tensor([torch.ones(len(s)) for s in sequences], layout=torch.jagged)
    batch = TensorDict(
        {"input_ids": ids, "position_ids": positions, "loss_mask": mask, **tensors}, batch_size=len(sequences)
    )
    tu.assign_non_tensor(
        batch,
        use_remove_padding=use_remove_padding,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro_batch_size or len(sequences),
        use_fused_kernels=use_fused_kernels,
        temperature=temperature,
        global_batch_size=len(sequences) * dist.get_world_size(),
        update_lr_scheduler=last_of_step,
    )
    return batch


def next_token_loss(model_output: dict[str, torch.Tensor], data: TensorDict, dp_group: Any = None) -> tuple:
    """Mean negative log-likelihood over the tokens of the whole batch of all ranks (verl's loss contract)."""
    log_probs = model_output["log_probs"].values()
    ends = data["input_ids"].offsets()[1:] - 1  # the log-prob at a sequence's last token is of no token of its own
    keep = torch.ones_like(log_probs, dtype=torch.bool)
    keep[ends] = False
    loss = -log_probs[keep].sum() / data["batch_num_tokens"] * data["dp_size"]
    return loss, {}


@torch.no_grad()
def teacher_forced_log_probs(
    engine: Any, sequences: Sequence[Sequence[int]], micro_batch_size: int, **batch_settings: Any
) -> list:
    """Log-probability of every token but the first of each sequence, as the actor's log-prob pass computes it.

    Args:
        batch_settings: as for :func:`make_batch`.

    Returns:
        one float32 tensor of shape (length - 1,) for each sequence, in nats.
    """
    batch = make_batch(sequences, micro_batch_size=micro_batch_size, **batch_settings)
    tu.assign_non_tensor(batch, return_model_output=True)
    with engine.eval_mode():
        output = engine.infer_batch(batch)
    return [row[:-1].float().cpu() for row in output["model_output"]["log_probs"].unbind()]


def train_step(engine: Any, batch: TensorDict, loss: Callable[..., Any] = next_token_loss) -> dict[str, Any]:
    """One mini-batch through ``engine.train_batch``; returns verl's metrics of it."""
    with engine.train_mode():
        return engine.train_batch(batch, loss_function=loss)["metrics"]
