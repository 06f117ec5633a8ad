"""verl's training workers for a recipe, with a table of numbers in the place of the model.

Everything between a trainer's call and the loss is verl's: the worker that turns the configuration into a loss
function, the loop over mini-batches, the cut into micro-batches, the normalisers. The table is the model's output:
log-probs (or values) of each answer's tokens, which are what the loss is differentiated by.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from paper_losses import Answers


@contextlib.contextmanager
def one_process_on_cpu() -> Iterator[None]:
    """This process as verl's only rank, on verl's platform for a CPU."""
    from verl.plugin.platform import platform_manager

    from verl_fp16.cpu.platform import select_cpu_platform

    undo = select_cpu_platform(platform_manager)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        undo()


class TableEngine:
    """The part of verl's engine that a worker calls; the module's outputs are looked up by an answer's number.

    Args:
        table: (answers, positions), what the model says of each token of an answer.
        mask: (answers, positions), which of them are tokens.
        output: the output's name for verl's loss: ``log_probs`` or ``values``.
    """

    ulysses_sequence_parallel_size = 1

    def __init__(self, table: torch.Tensor, mask: torch.Tensor, output: str) -> None:
        self.table = table.detach().float().requires_grad_()
        self.mask = mask
        self.output = output
        self.losses: list[float] = []
        self.gradients: list[torch.Tensor] = []
        self.micro_batches = 0

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        from verl.workers.engine.base import BaseEngine

        outputs = BaseEngine.train_batch(self, data, loss_function)
        self.micro_batches = len(outputs["loss"])
        self.losses.append(sum(outputs["loss"]))
        return outputs

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

        return FSDPEngine.forward_backward_batch(self, data, loss_function, forward_only)

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        output = outputs_of(self.table, self.mask, micro_batch["input_ids"])
        loss, metrics = loss_function(model_output={self.output: output}, data=micro_batch, dp_group=None)
        return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": metrics}

    def optimizer_zero_grad(self) -> None:
        self.table.grad = None

    def optimizer_step(self) -> float:
        self.gradients.append(self.table.grad.clone())
        return float(self.table.grad.norm())

    def train_mode(self, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _gradient_sync_context(self, is_last_micro_batch: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def lr_scheduler_step(self) -> float:
        return 0.0


def outputs_of(table: torch.Tensor, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The model's output over the tokens of prompt and answer, jagged; a token's is one place earlier, as with verl.

    An answer's number is the first token of its prompt.
    """
    rows = []
    for tokens in input_ids.unbind():
        number = int(tokens[0])
        own = table[number][mask[number]]
        rows.append(torch.cat([torch.zeros(len(tokens) - len(own) - 1), own, torch.zeros(1)]))
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


class TableWorker:
    """verl's ``TrainingWorker`` around a :class:`TableEngine`."""

    enable_routing_replay = False
    profiler = SimpleNamespace(step=lambda: None, check_enable=lambda: False, rank=0)

    def __init__(self, config: Any, engine: TableEngine) -> None:
        self.config, self.engine = config, engine
        self.model_config, self.engine_config = config.model_config, config.engine_config
        self.loss_fn: Any = None

    def reset(self) -> None:
        pass

    def set_loss_fn(self, loss_fn: Any) -> None:
        self.loss_fn = loss_fn

    def get_dispatch_collect(self) -> dict[str, Any]:
        return {}

    def train_mini_batch(self, data: Any) -> Any:
        from verl.workers.engine_workers import TrainingWorker

        return TrainingWorker.train_mini_batch(self, data)

    def train_batch(self, data: Any) -> Any:
        from verl.workers.engine_workers import TrainingWorker

        return TrainingWorker.train_batch(self, data)

    def _postprocess_output(self, output: Any, **kwargs: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": {"mfu": 0.0, "loss": sum(output["loss"])}})


@dataclass(frozen=True)
class Workers:
    """The workers of a run; ``critic`` is None without one."""

    actor: TableWorker
    critic: TableWorker | None


def make_workers(config: DictConfig, answers: Answers) -> Workers:
    """The workers as verl makes them before ``fit``: what the driver changes afterwards does not reach them."""
    from verl.trainer.ppo.utils import need_critic

    actor = make_actor(config, TableEngine(answers.pi, answers.mask, "log_probs"))
    critic = (
        make_critic(config, TableEngine(answers.predicted, answers.mask, "values")) if need_critic(config) else None
    )
    return Workers(actor, critic)


def make_actor(config: DictConfig, engine: TableEngine) -> TableWorker:
    """What verl's ``ActorRolloutRefWorker`` makes of its part of the configuration, sent to it as Ray sends it."""
    from verl.trainer.distillation import is_distillation_enabled
    from verl.workers.engine_workers import ActorRolloutRefWorker

    received = pickle.loads(pickle.dumps(config.actor_rollout_ref))
    host = SimpleNamespace(
        config=received,
        role="actor",
        distillation_enabled=is_distillation_enabled(config.get("distillation")),
        distillation_config=config.get("distillation"),
        _omega_profiler_config=received.actor.get("profiler", {}),
        actor_worker_cls=partial(TableWorker, engine=engine),
        set_dispatch_collect=lambda **kwargs: None,
    )
    ActorRolloutRefWorker.init_model(host)
    return host.actor


def make_critic(config: DictConfig, engine: TableEngine) -> TableWorker:
    """As both trainers make it: a worker with verl's loss for values and the critic's configuration."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine_workers import TrainingWorkerConfig
    from verl.workers.utils.losses import value_loss

    critic = pickle.loads(pickle.dumps(omega_conf_to_dataclass(config.critic)))
    critic.engine.max_token_len_per_gpu = critic.ppo_max_token_len_per_gpu
    settings = TrainingWorkerConfig(
        model_type="value_model",
        model_config=critic.model,
        engine_config=critic.engine,
        optimizer_config=critic.optim,
        checkpoint_config=critic.checkpoint,
    )
    worker = TableWorker(settings, engine)
    worker.set_loss_fn(partial(value_loss, config=critic))
    return worker
