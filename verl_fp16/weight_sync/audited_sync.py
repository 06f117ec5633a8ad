"""Each weight sync, watched from the trainer's process, which asks the ranks and vLLM's workers through Ray."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from verl_fp16.telling import tell
from verl_fp16.weight_sync import audit
from verl_fp16.weight_sync.audit import WeightSyncError
from verl_fp16.weight_sync.rank_calls import KEEP

_V1_TRAINER = "verl.trainer.ppo.v1.trainer_base"

# Answers come from processes that have just finished a sync, or are idle.
_TIMEOUT_S = 600.0
_OF_THE_AUDIT = ("sync/audit", "sync/probe")

# Whether the trainer of this process has compared what runs with what was declared. verl's v1 trainer syncs once before
# that, and what is wrong with a process is told more clearly by the read-back than by what follows from it.
read_back_done = False
_deferred: list[WeightSyncError] = []

# What the syncs since the last logged training step have to tell, in this process.
_pending: dict[str, float] = {}


class AuditedSync:
    """All syncs of one of verl's ``CheckpointEngineManager``\\ s.

    In the first one everything goes as it is, and the audit learns what may go in the rollout's dtype.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        # What the rollout has said, where the ranks have not been told yet.
        self._learned: dict[str, list[str]] | str | None = None
        self._name = uuid.uuid4().hex
        self._syncs = 0
        self._settings: dict[str, Any] | None = None
        self._auditing = False
        self._probe: dict[str, list] | None = None
        self._began = 0.0
        self._told: set[str] = set()

    def before(self) -> None:
        """Get ranks and workers ready.

        Raises:
            WeightSyncError: a process cannot be asked, or what :meth:`after` put off.
        """
        raise_deferred()
        try:
            self._prepare()
        except WeightSyncError as error:
            self._auditing = False
            self._raise_or_defer(error)
        self._began = time.perf_counter()

    def _prepare(self) -> None:
        interval = self._settings["audit_interval"] if self._settings else 0
        self._auditing = self._syncs == 0 or bool(interval) and self._syncs % interval == 0
        prepared = self._ask_ranks(_prepare(self._name, self._learned, self._auditing))
        self._learned = KEEP
        self._settings = prepared[0][1] if prepared else None
        if self._settings is None:
            self._auditing = False
        if self._auditing:
            self._ask_servers("verl_fp16_begin_audit")
            self._probe = self._probe_actor()

    def after(self) -> dict[str, float]:
        """Hold what the sync did against what it should have done; returns its metrics.

        Raises:
            WeightSyncError: the rollout does not hold, or compute with, what was trained; before it rolls out. Of the
                sync before the read-back it is put off until after that, or until the next sync.
        """
        seconds = time.perf_counter() - self._began
        if self._settings is None:
            return {}
        self._syncs += 1
        try:
            return self._judge(seconds)
        except WeightSyncError as error:
            self._raise_or_defer(error)
            return {}

    def _raise_or_defer(self, error: WeightSyncError) -> None:
        # Only verl's v1 trainer has its first sync before its fit.
        if self._syncs > 1 or read_back_done or _V1_TRAINER not in sys.modules:
            raise error
        _deferred.append(error)

    def _judge(self, seconds: float) -> dict[str, float]:
        senders = self._ask_ranks(_report)
        found = audit.metrics(senders, seconds)
        receivers: list = []
        if self._auditing:
            began = time.perf_counter()
            receivers = self._ask_servers("verl_fp16_end_audit", self._settings["dtype"])
            self._learned = audit.learned(receivers)
        faults = [*self._cast_faults(senders, receivers)]
        if self._auditing:
            faults += [*audit.stream_faults(senders, receivers), *audit.holding_faults(receivers)]
            faults += self._probe_faults(rolled_out := self._rolled_out_probe())
            # Later syncs of adapters leave the base alone.
            for line in audit.unchecked(receivers) if self._syncs == 1 else ():
                self._tell_once(line)
            found |= {"sync/audit_ok": float(not faults), "sync/audit_seconds": time.perf_counter() - began}
            if rolled_out:
                distances = [audit.probe_distance(self._probe["log_probs"], said) for said in rolled_out.values()]
                found["sync/probe_abs_diff"] = max(distances)
        if faults:
            raise WeightSyncError(self._message(faults))
        if self._syncs == 1:
            self._tell_once(self._first_audit(found, senders, receivers))
            # It belongs to no training step.
            found = {name: value for name, value in found.items() if name.startswith(_OF_THE_AUDIT)}
        _add(found)
        return found

    def _cast_faults(self, senders: audit.Named, receivers: audit.Named) -> list[str]:
        """Weights that the rollout's dtype cannot hold. What the rollout holds in another dtype has nothing to fear."""
        import torch

        from verl_fp16.weight_cast import CastCounts, CheckedCast, WeightOverflow

        by_name = audit.cast_faults(senders, audit.learned(receivers)["exempt"])
        if not by_name:
            return []
        counts = {name: CastCounts(**fields) for name, fields in by_name.items()}
        cast = CheckedCast(getattr(torch, self._settings["dtype"]), self._settings["on_overflow"])
        try:
            cast.check(counts)
        except WeightOverflow as error:
            return [f"{error} (the setting is verl_fp16.sync.on_overflow)"]
        return []

    def _probe_actor(self) -> dict[str, list] | None:
        """The probe's tokens and the actor's log-probabilities, before vLLM takes the memory back."""
        try:
            answers = self._ask_ranks(_probe)
        except WeightSyncError as error:
            # A model may need more than tokens, such as images. That part of the audit is then left out, and said so.
            self._tell_once(f"the audit of the weight sync goes without its probe of the logits: {error}")
            return None
        probe = answers[0][1]
        return probe if len(probe["log_probs"]) else None

    def _rolled_out_probe(self) -> dict[str, list[float]]:
        """Replica -> its log-probabilities of the probe's tokens; none where the audit goes without its probe."""
        if self._probe is None:
            return {}
        try:
            answers = self._ask_servers("verl_fp16_probe", self._probe["tokens"], each=lambda who, said: [(who, said)])
        except WeightSyncError as error:
            self._tell_once(f"the audit of the weight sync goes without its probe of the logits: {error}")
            self._probe = None
            return {}
        rolled_out = {who: log_probs for who, log_probs in answers if log_probs}
        if not rolled_out:
            self._tell_once("the audit of the weight sync goes without its probe: the rollout takes no requests now")
            self._probe = None
        return rolled_out

    def _probe_faults(self, rolled_out: dict[str, list[float]]) -> list[str]:
        if not rolled_out:
            return []
        half = "bfloat16" in (self._settings["dtype"], self._settings["train_dtype"])
        limit = self._settings["probe_tolerance"] * (10 if half else 1)
        return list(audit.probe_fault(self._probe["log_probs"], rolled_out, limit))

    def _ask_ranks(self, ask: Callable[[Any], Any]) -> list[tuple[str, Any]]:
        # verl 0.8 calls the actor's worker group the trainer.
        group = getattr(self._manager, "actor_wg", None) or self._manager.trainer
        return _answers([(f"actor rank {rank}", ask(actor)) for rank, actor in enumerate(group.workers)])

    def _ask_servers(self, method: str, *args: Any, each: Callable[..., Any] | None = None) -> list[tuple[str, Any]]:
        """What all workers of all replicas say; with ``each``, what it makes of each first server's answer."""
        calls = []
        for replica in self._manager.replicas:
            servers = replica.servers[:1] if each else replica.servers
            for server in servers:
                who = f"rollout replica {replica.replica_rank}"
                try:
                    calls.append((who, getattr(server, method).remote(*args)))
                except AttributeError:
                    raise WeightSyncError(
                        f"verl_fp16: {who} has no method {method}: it is not vLLM's server, or runs without this "
                        "package. Set actor_rollout_ref.rollout.name=vllm and install verl-fp16 on every node"
                    ) from None
        each = each or (lambda who, said: [(f"{who} worker {report.get('rank', '?')}", report) for report in said])
        return [item for who, said in _answers(calls) for item in each(who, said)]

    def _first_audit(self, found: dict[str, float], senders: audit.Named, receivers: audit.Named) -> str:
        wide = sorted({f"{name} ({why})" for _, report in receivers for name, why in report["wide"].items()})
        tensors = len(senders[0][1]["stream"])
        probe = f"; the probe of {len(self._probe['log_probs'])} tokens agrees" if self._probe else ""
        return (
            f"the first weight sync is audited: {tensors} tensors, {found['sync/bytes'] / 1e6:.1f} MB, arrived and are "
            f"held as sent by {len(receivers)} workers{probe}. From now on they go in "
            f"{self._settings['dtype']}{', but for ' + audit.listed(wide) if wide else ''}"
        )

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            tell(line)

    def _message(self, faults: Sequence[str]) -> str:
        return (
            "verl_fp16: the rollout would not run the weights that were trained, so the run stops before it rolls out "
            f"(sync {self._syncs} of this run):\n  " + "\n  ".join(faults)
        )


def _answers(calls: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    import ray

    found = []
    for who, call in calls:
        try:
            found.append((who, ray.get(call, timeout=_TIMEOUT_S)))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise WeightSyncError(f"verl_fp16: {who} could not be asked about the weight sync: {error}") from error
    return found


def _prepare(manager: str, learned: dict[str, list[str]] | str | None, digests: bool) -> Callable[[Any], Any]:
    from verl_fp16.weight_sync.rank_calls import prepare_sync

    return lambda actor: actor.__ray_call__.remote(prepare_sync, manager, learned, digests)


def _report(actor: Any) -> Any:
    from verl_fp16.weight_sync.rank_calls import report_sync

    return actor.__ray_call__.remote(report_sync)


def _probe(actor: Any) -> Any:
    from verl_fp16.weight_sync.rank_calls import probe_actor

    return actor.__ray_call__.remote(probe_actor)


def raise_deferred() -> None:
    """Raise what was found in a sync before the read-back."""
    if _deferred:
        raise _deferred.pop()


def _add(found: dict[str, float]) -> None:
    """Of several syncs between two logged steps, bytes and seconds add up, and of the rest the last counts."""
    for name, value in found.items():
        adds_up = name in ("sync/bytes", "sync/seconds", "sync/audit_seconds")
        _pending[name] = _pending.get(name, 0.0) + value if adds_up else value


def add_sync_metrics(step: Any) -> None:
    """An observer of the training step: adds what its syncs have to tell."""
    for name, value in _pending.items():
        step.metrics.setdefault(name, value)
    _pending.clear()
