"""Asks every process of a run what it runs, from the trainer's process, through Ray.

Training ranks are asked with a function of ours that Ray carries to verl's actors; where the package is missing, its
unpickling fails there, which is that rank's answer. vLLM's workers are asked through their server, to which
:mod:`verl_fp16.hooks.rollout` gives a method for it. No process is waited for longer than the timeout.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verl_fp16.readback.compare import Answer
from verl_fp16.readback.rank import report_process, report_training_worker

SERVER_METHOD = "verl_fp16_report"


@dataclass(frozen=True)
class Question:
    """What one Ray actor is asked.

    Args:
        who: the actor in words.
        roles: the roles that it has to report.
        actor: its handle.
        ask: starts the call on the handle and returns Ray's reference to what will come.
        answers: makes answers of what came; called with this question, the value and the actor's place in words.
    """

    who: str
    roles: tuple[str, ...]
    actor: Any
    ask: Callable[[Any], Any]
    answers: Callable[[Question, Any, str], list[Answer]]


def gather(trainer: Any, timeout_s: float) -> list[Answer]:
    """The answers of all processes of ``trainer``; the first is this process's own.

    Args:
        trainer: one of verl's PPO trainers, whose workers are up.
        timeout_s: seconds after which a process that has not answered counts as silent.
    """
    own = Answer("trainer", report=report_process())
    return [own, *ask([*training_questions(trainer), *rollout_questions(trainer)], timeout_s)]


def training_questions(trainer: Any) -> list[Question]:
    """One for each actor of the worker groups, with all roles that share it."""
    roles: dict[str, tuple[Any, list[str]]] = {}
    for role, group in _worker_groups(trainer):
        for actor in group.workers:
            roles.setdefault(_actor_id(actor), (actor, []))[1].append(role)
    total = len(roles)
    return [
        Question(f"training worker {index} of {total}", tuple(of), actor, _ask_training_worker, _one_answer)
        for index, (actor, of) in enumerate(roles.values())
    ]


def _worker_groups(trainer: Any) -> Iterator[tuple[str, Any]]:
    yield "actor", trainer.actor_rollout_wg
    # With LoRA the reference policy is the actor without its adapter: there is no engine of its own.
    if trainer.use_reference_policy and not trainer.ref_in_actor:
        yield "ref", trainer.ref_policy_wg
    if trainer.use_critic:
        yield "critic", trainer.critic_wg


def _actor_id(actor: Any) -> str:
    return actor._actor_id.hex()


def _ask_training_worker(actor: Any) -> Any:
    return actor.__ray_call__.remote(report_training_worker)


def _one_answer(question: Question, report: Any, place: str) -> list[Answer]:
    return [Answer(question.who, question.roles, report)]


def rollout_questions(trainer: Any) -> list[Question]:
    """One for each server of each rollout replica."""
    # The standalone servers are those of verl's separate_async mode.
    managers = [getattr(trainer, name, None) for name in ("llm_server_manager", "standalone_server_manager")]
    questions = []
    for replica in (replica for manager in managers if manager is not None for replica in manager.get_replicas()):
        for index, server in enumerate(replica.servers):
            who = f"rollout replica {replica.replica_rank}"
            if len(replica.servers) > 1:
                who += f", server {index} of {len(replica.servers)}"
            # The first server has the engine, and through it all workers of the replica, also those on other nodes.
            workers = replica.world_size if index == 0 else 0
            questions.append(
                Question(who, ("rollout",) if workers else (), server, _ask_server, _answers_of_server(workers))
            )
    return questions


def _ask_server(actor: Any) -> Any:
    try:
        method = getattr(actor, SERVER_METHOD)
    except AttributeError:
        raise TypeError(
            f"{actor!r} is not vLLM's server, the only rollout whose precision can be read back; set "
            "actor_rollout_ref.rollout.name=vllm"
        ) from None
    return method.remote()


def _answers_of_server(expected: int) -> Callable[[Question, Any, str], list[Answer]]:
    def answers(question: Question, said: Any, place: str) -> list[Answer]:
        listed = [Answer(f"{question.who}, server", report=said["server"])]
        listed += [
            Answer(f"{question.who}, worker {index}", ("rollout",), report)
            for index, report in enumerate(said["workers"])
        ]
        if len(said["workers"]) != expected:
            failure = f"{len(said['workers'])} of its {expected} workers answered"
            listed.append(Answer(question.who, question.roles, failure=failure, where=place))
        return listed

    return answers


def ask(questions: Sequence[Question], timeout_s: float) -> list[Answer]:
    """Ask all at once and return what came within ``timeout_s``, in the order of ``questions``."""
    end = time.monotonic() + timeout_s
    # Where an actor is, it can tell without our package, so that one that lacks it is named too.
    places = [_start(_ask_place, question.actor) for question in questions]
    calls = [_start(question.ask, question.actor) for question in questions]
    answers: list[Answer] = []
    for question, place, call in zip(questions, places, calls, strict=True):
        # What an actor that hangs was asked first shares its fate.
        said, failure = _value(call, end - time.monotonic())
        where, _ = _value(place, 1.0)
        if failure:
            silent = f"no answer within {timeout_s:g} s (verl_fp16.read_back_timeout_s)"
            failure = silent if failure == _SILENT else failure
            answers.append(Answer(question.who, question.roles, failure=failure, where=where or ""))
        else:
            answers += question.answers(question, said, where or "")
    return answers


_SILENT = "silent"


def _ask_place(actor: Any) -> Any:
    # A function without a name travels by value: nothing of ours is imported on the other side.
    return actor.__ray_call__.remote(lambda self: f"host {socket.gethostname()}, pid {os.getpid()}")


def _start(ask: Callable[[Any], Any], actor: Any) -> Any:
    try:
        return ask(actor)
    except Exception as error:  # noqa: BLE001  an actor that cannot even be asked is a difference like any other
        return error


def _value(call: Any, timeout_s: float) -> tuple[Any, str]:
    """(what came, ""), or (None, why nothing came)."""
    import ray

    if isinstance(call, Exception):
        return None, _reason(call)
    try:
        return ray.get(call, timeout=max(timeout_s, 0.0)), ""
    except ray.exceptions.GetTimeoutError:
        return None, _SILENT
    except Exception as error:  # noqa: BLE001  whatever was raised there comes out here, as its own class
        return None, _reason(error)


def _reason(error: Exception) -> str:
    """The error in one line: the last line of what Ray carried over is the one that was raised there."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    name = type(cause).__name__
    return text if text.startswith(name) else f"{name}: {text}"
