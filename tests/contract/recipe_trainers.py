"""One training step of verl's trainers on a batch that is there already, without Ray, vLLM or a model.

What is left out is what brings the batch and takes the weights away. Log-probs before the step and values are read
from the batch; the order of the steps, and what each makes of the configuration, is verl's: ``_step_once`` of the v1
trainer, ``fit`` of the legacy one.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import DictConfig
from paper_losses import Answers
from recipe_batch import ANSWERS, PROMPTS, QUESTIONS
from recipe_workers import Workers, outputs_of

PROMPT_WIDTH = max(PROMPTS)
TOKEN = 7  # of no meaning


def train_step(trainer: str, config: DictConfig, workers: Workers, answers: Answers) -> int:
    """A step of the trainer ``v1`` or ``legacy``; the workers' engines have the losses and the gradients after it.

    Returns:
        how often the trainer asked for the log-probs before the step.
    """
    return {"v1": _step_of_v1, "legacy": _step_of_legacy}[trainer](config, workers, answers)


def prompt_of(number: int) -> torch.Tensor:
    """Begins with the answer's number, by which the table is read."""
    return torch.tensor([number] + [TOKEN] * (PROMPTS[number // ANSWERS] - 1))


# --- the v1 trainer ---------------------------------------------------------------------------------------------------


class Queue:
    """TransferQueue's key-value interface in memory: a dictionary of fields for each answer."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str] | None = None) -> Any:
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        there = self.rows[keys[0]]
        names = [name for name in select_fields or there if name in there]
        return list_of_dict_to_tensordict([{name: self.rows[key][name] for name in names} for key in keys])

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: Any) -> Any:
        for name, values in fields.items():
            for key, value in zip(keys, values.unbind(), strict=True):
                self.rows[key][name] = value
        return make_batch(keys)


def make_batch(keys: list[str]) -> Any:
    from transfer_queue import KVBatchMeta

    return KVBatchMeta(keys=list(keys), tags=[{} for _ in keys], partition_id="train")


def rows_of(answers: Answers) -> dict[str, dict[str, Any]]:
    """What verl's agent loop puts into the queue, without what only its metrics read."""
    rows = {}
    for number, mask in enumerate(answers.mask):
        length = int(mask.sum())
        question, prompt, response = number // ANSWERS, prompt_of(number), torch.full((length,), TOKEN)
        ones = torch.ones(length, dtype=torch.int64)
        rows[f"question{question}_{number % ANSWERS}_0"] = {
            "uid": f"question{question}",
            "prompts": prompt,
            "responses": response,
            "input_ids": torch.cat([prompt, response]),
            "position_ids": torch.arange(len(prompt) + length),
            "response_mask": ones,
            "loss_mask": ones.clone(),
            "rollout_log_probs": answers.mu[number, :length].float(),
            "rm_scores": torch.cat([torch.zeros(length - 1), answers.rewards[number : number + 1].float()]),
        }
    return rows


class QueueActor:
    """The v1 trainer's view of the actor: it is told keys, and reads and writes the queue."""

    def __init__(self, queue: Queue, workers: Workers, answers: Answers) -> None:
        self.queue, self.workers, self.answers = queue, workers, answers
        self.log_prob_passes = 0

    def compute_log_prob(self, batch: Any) -> Any:
        self.log_prob_passes += 1
        return self._put(batch, log_probs=self.answers.pi_old.float(), entropy=torch.zeros_like(self.answers.pi_old))

    def infer_batch(self, batch: Any) -> Any:
        self._put(batch, values=self.answers.values.float())
        return SimpleNamespace(futures=[])

    def update_actor(self, batch: Any) -> Any:
        return self.workers.actor.train_mini_batch(self._data(batch))

    def train_mini_batch(self, batch: Any) -> Any:
        output = self.workers.critic.train_mini_batch(self._data(batch))
        return SimpleNamespace(get=lambda: output)

    def _put(self, batch: Any, **tables: torch.Tensor) -> Any:
        ids = self.queue.kv_batch_get(batch.keys, batch.partition_id, ["input_ids", "uid"])
        fields = {name: outputs_of(table, self.answers.mask, ids["input_ids"]) for name, table in tables.items()}
        return self.queue.kv_batch_put(batch.keys, batch.partition_id, fields)

    def _data(self, batch: Any) -> Any:
        """Fields and settings together, as verl hands them to a worker."""
        from verl.utils import tensordict_utils as tu

        data = self.queue.kv_batch_get(batch.keys, batch.partition_id)
        for name, value in batch.extra_info.items():
            tu.assign_non_tensor_data(data, name, value)
        return data


def _step_of_v1(config: DictConfig, workers: Workers, answers: Answers) -> int:
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base

    queue = Queue(rows_of(answers))
    trainer = object.__new__(get_trainer_cls(config.trainer.v1.trainer_mode))
    trainer.config = config
    trainer.global_steps = 1
    trainer.use_critic, trainer.use_reference_policy = need_critic(config), need_reference_policy(config)
    trainer.actor_rollout_wg = trainer.critic_wg = QueueActor(queue, workers, answers)
    batch = make_batch(list(queue.rows))
    trainer.replay_buffer = SimpleNamespace(sample=lambda **kwargs: (batch, {}))
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    trainer.on_sample_begin = trainer.on_sample_end = lambda: None
    trainer._balance_batch = lambda batch, metrics: batch
    with (
        mock.patch.object(trainer_base, "tq", queue),
        mock.patch.object(trainer_base, "ray", SimpleNamespace(get=lambda futures: None)),
    ):
        trainer._step_once({}, {}, config.data.train_batch_size)
    return trainer.actor_rollout_wg.log_prob_passes


# --- the legacy trainer -----------------------------------------------------------------------------------------------


def generated(answers: Answers) -> Any:
    """What verl's agent loop returns to the legacy trainer: prompts padded on the left, answers on the right."""
    from verl.protocol import DataProto

    count, width = answers.mask.shape
    prompts, prompt_mask = torch.zeros(2, count, PROMPT_WIDTH, dtype=torch.int64)
    for number in range(count):
        prompt = prompt_of(number)
        prompts[number, -len(prompt) :], prompt_mask[number, -len(prompt) :] = prompt, 1
    mask = answers.mask.long()
    attention_mask = torch.cat([prompt_mask, mask], dim=1)
    rewards = torch.zeros(count, width)
    rewards[torch.arange(count), mask.sum(-1) - 1] = answers.rewards.float()
    tensors = {
        "prompts": prompts,
        "responses": mask * TOKEN,
        "input_ids": torch.cat([prompts, mask * TOKEN], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
        "response_mask": mask,
        "rollout_log_probs": answers.mu.float(),
        "rm_scores": rewards,
    }
    nothing = np.array([{} for _ in range(count)], dtype=object)
    return DataProto.from_dict(tensors, {"multi_modal_inputs": nothing}, meta_info={"timing": {}})


class BatchActor:
    """The legacy trainer's view of the actor and the critic: it sends the batch."""

    def __init__(self, workers: Workers, answers: Answers) -> None:
        self.workers, self.answers = workers, answers
        self.log_prob_passes = 0

    def compute_log_prob(self, batch: Any) -> Any:
        from verl.utils import tensordict_utils as tu

        self.log_prob_passes += 1
        log_probs = outputs_of(self.answers.pi_old.float(), self.answers.mask, batch["input_ids"])
        output = {"log_probs": log_probs, "entropy": torch.zeros_like(log_probs)}
        return tu.get_tensordict(output, non_tensor_dict={"metrics": {"mfu": 0.0}})

    def infer_batch(self, batch: Any) -> Any:
        output = {"values": outputs_of(self.answers.values.float(), self.answers.mask, batch["input_ids"])}
        return SimpleNamespace(get=lambda: output)

    def update_actor(self, batch: Any) -> Any:
        return self.workers.actor.train_mini_batch(batch)

    def train_mini_batch(self, batch: Any) -> Any:
        output = self.workers.critic.train_mini_batch(batch)
        return SimpleNamespace(get=lambda: output)


def _step_of_legacy(config: DictConfig, workers: Workers, answers: Answers) -> int:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    trainer = object.__new__(RayPPOTrainer)
    trainer.config = config
    trainer.use_critic, trainer.use_reference_policy = need_critic(config), need_reference_policy(config)
    trainer.use_rm = False
    trainer.total_training_steps = 1
    trainer.train_dataloader = [{"question": torch.arange(QUESTIONS)}]
    trainer.actor_rollout_wg = trainer.critic_wg = BatchActor(workers, answers)
    trainer.async_rollout_manager = SimpleNamespace(generate_sequences=lambda batch: generated(answers))
    trainer.checkpoint_manager = mock.Mock()
    trainer.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)
    trainer._dump_executor = mock.Mock(_shutdown=False)
    trainer._load_checkpoint = trainer._save_checkpoint = trainer._shutdown_dump_executor = lambda: None
    trainer._start_profiling = trainer._stop_profiling = lambda *args, **kwargs: None
    trainer._balance_batch = lambda batch, metrics: None
    with mock.patch("verl.utils.tracking.Tracking"):
        inspect.unwrap(RayPPOTrainer.fit)(trainer)  # without the reading back of what runs, for which nothing does
    return trainer.actor_rollout_wg.log_prob_passes
