"""Asking over real Ray: an actor without the package, one that hangs, one that is dead, and those that answer."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl_fp16.leftovers import ray_temp_dir
from verl_fp16.readback import gather
from verl_fp16.readback.compare import Answer
from verl_fp16.readback.gather import Question, ask, rollout_questions, training_questions


class Worker:
    """As verl's workers: with an asynchronous method, so that Ray runs it on an event loop."""

    def take_package_away(self):
        """As on a node where it was never installed: importing anything of it fails."""
        import sys

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "verl_fp16":
                    raise ModuleNotFoundError(f"No module named {name!r}")

        sys.meta_path.insert(0, Missing())
        for name in [name for name in sys.modules if name.partition(".")[0] == "verl_fp16"]:
            del sys.modules[name]

    async def hang(self):
        time.sleep(3600)

    async def loop(self):
        return None


class Server:
    def __init__(self, workers: int = 1):
        self.workers = workers

    async def verl_fp16_report(self):
        return {"server": {"pid": 1}, "workers": [{"rank": rank} for rank in range(self.workers)]}


@pytest.fixture(scope="module")
def ray():
    import ray

    with ray_temp_dir() as folder:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            _temp_dir=str(folder),
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        )
        yield ray
        ray.shutdown()


def training(actor) -> Question:
    return Question("training worker", ("actor",), actor, gather._ask_training_worker, gather._one_answer)


def test_each_actor_that_does_not_report_is_named_with_its_place_and_reason(ray):
    workers = [ray.remote(Worker).options(num_cpus=0.1).remote() for _ in range(3)]
    ray.get(workers[0].take_package_away.remote())
    ray.get([worker.loop.remote() for worker in workers])
    ray.kill(workers[1])
    workers[2].hang.remote()
    start = time.monotonic()
    missing, dead, silent = ask([training(worker) for worker in workers], timeout_s=8)
    assert time.monotonic() - start < 20
    assert "No module named 'verl_fp16" in missing.failure
    assert missing.where.startswith("host ")
    assert "pid" in missing.where
    assert "Actor" in dead.failure
    assert silent.failure == "no answer within 8 s (verl_fp16.read_back_timeout_s)"
    assert all(answer.report is None and answer.roles == ("actor",) for answer in (missing, dead, silent))


def test_servers_answer_for_themselves_and_their_workers(ray):
    whole, short = (ray.remote(Server).options(num_cpus=0.1).remote(workers) for workers in (2, 1))
    other = ray.remote(Worker).options(num_cpus=0.1).remote()
    replicas = [SimpleNamespace(replica_rank=i, world_size=2, servers=[s]) for i, s in enumerate((whole, short, other))]
    manager = SimpleNamespace(get_replicas=lambda: replicas)
    answers = ask(rollout_questions(SimpleNamespace(llm_server_manager=manager)), timeout_s=60)
    assert answers[:4] == [
        Answer("rollout replica 0, server", report={"pid": 1}),
        Answer("rollout replica 0, worker 0", ("rollout",), {"rank": 0}),
        Answer("rollout replica 0, worker 1", ("rollout",), {"rank": 1}),
        Answer("rollout replica 1, server", report={"pid": 1}),
    ]
    short_of_one, not_vllm = answers[5:]
    assert short_of_one.failure == "1 of its 2 workers answered"
    assert short_of_one.where.startswith("host ")
    assert "is not vLLM's server" in not_vllm.failure
    assert "rollout.name=vllm" in not_vllm.failure


def test_a_question_goes_to_each_process_once_with_all_of_its_roles(ray):
    shared, alone = (ray.remote(Worker).options(num_cpus=0.1).remote() for _ in range(2))
    group, other = SimpleNamespace(workers=[shared]), SimpleNamespace(workers=[alone])
    trainer = SimpleNamespace(
        actor_rollout_wg=group,
        ref_policy_wg=group,
        critic_wg=other,
        use_reference_policy=True,
        use_critic=True,
        ref_in_actor=False,
    )
    assert [q.roles for q in training_questions(trainer)] == [("actor", "ref"), ("critic",)]
    trainer.ref_in_actor = True
    assert [q.roles for q in training_questions(trainer)] == [("actor",), ("critic",)], "LoRA: no engine of its own"
    trainer.critic_wg = group
    assert [q.roles for q in training_questions(trainer)] == [("actor", "critic")]
    trainer.use_critic = False
    assert [(q.who, q.roles) for q in training_questions(trainer)] == [("training worker 0 of 1", ("actor",))]
