"""The rollout holds exactly the weights that were trained: what is sent, what arrives, and the audit of both.

:mod:`~verl_fp16.weight_sync.sender` runs in every FSDP rank, :mod:`~verl_fp16.weight_sync.receiver` in every vLLM
worker. In the trainer's process :mod:`~verl_fp16.weight_sync.audited_sync` asks both, and
:mod:`~verl_fp16.weight_sync.audit` compares what they say. The hooks that connect them with verl are in
:mod:`verl_fp16.hooks.weight_sync`. Nothing here imports verl or vLLM.
"""
