"""The syncs of a run as the trainer's process sees them: when it audits, what it logs, what stops the run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from verl_fp16.weight_sync import audited_sync, rank_calls
from verl_fp16.weight_sync.audit import WeightSyncError
from verl_fp16.weight_sync.audited_sync import AuditedSync, add_sync_metrics
from verl_fp16.weight_sync.receiver import WeightReceiver

WEIGHTS = {"norm": torch.linspace(0.1, 1, 8), "gate": torch.linspace(1, 2, 8)}


class Rollout:
    """A replica with one server: the methods that our hook adds, around two parameters."""

    replica_rank = 0

    def __init__(self) -> None:
        self.held = {"norm": torch.zeros(8, dtype=torch.float16), "gate": torch.zeros(8)}
        self.receiver: WeightReceiver | None = None
        self.probe: list[float] | Exception = [-1.0, -2.0]
        self.servers = [self]
        self.audits = 0

    def __getattr__(self, name: str) -> SimpleNamespace:
        if not name.startswith("verl_fp16_"):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *args: getattr(self, name.removeprefix("verl_fp16_"))(*args))

    def begin_audit(self) -> list:
        self.audits += 1
        self.receiver = WeightReceiver(lambda: list(self.held.items()))
        return [{}]

    def end_audit(self, dtype: str) -> list:
        receiver, self.receiver = self.receiver, None
        return [{"rank": 0, **receiver.report(getattr(torch, dtype))}]

    def load(self, weights: list) -> None:
        def copy() -> None:
            for name, tensor in weights:
                self.held[name].copy_(tensor)

        if self.receiver is None:
            copy()
        else:
            self.receiver.load(weights, copy)


class Rank:
    """A Ray actor of verl's with an actor's engine."""

    def __init__(self, **settings) -> None:
        ours = {"role": "actor", "dtype": "float16"}
        ours["weight_sync"] = {"dtype": "float16", "on_overflow": "error", "audit_interval": 2, "probe_tolerance": 0.05}
        ours["weight_sync"] |= settings
        mixed_precision = {"verl_fp16": ours}
        self.engine = SimpleNamespace(engine_config=SimpleNamespace(mixed_precision=mixed_precision))
        self.actor = SimpleNamespace(engine=self.engine)
        self.__ray_call__ = SimpleNamespace(remote=lambda function, *args: function(self, *args))
        self.state = {name: tensor.clone() for name, tensor in WEIGHTS.items()}

    def stream(self) -> list:
        sender = rank_calls.sender_of(self.engine)
        sender.begin()
        return list(sender.watch(sender.images(self.state, "cpu").items()))


@pytest.fixture
def run(monkeypatch):
    """One rank, one replica, and no Ray between them."""
    told: list[str] = []
    monkeypatch.setattr(audited_sync, "_answers", lambda calls: calls)
    monkeypatch.setattr(audited_sync, "tell", told.append)
    monkeypatch.setattr(audited_sync, "_pending", {})
    monkeypatch.setattr(audited_sync, "_deferred", [])
    monkeypatch.setattr(audited_sync, "read_back_done", True)
    monkeypatch.setattr(audited_sync, "_V1_TRAINER", __name__)
    probe = {"tokens": [1, 2, 3], "log_probs": [-1.0, -2.0]}
    monkeypatch.setattr(audited_sync, "_probe", lambda actor: probe)
    return build(told)


def build(told: list[str], **settings) -> SimpleNamespace:
    rank, rollout = Rank(**settings), Rollout()
    rollout.probe = lambda tokens: [-1.0, -2.0]
    manager = SimpleNamespace(actor_wg=SimpleNamespace(workers=[rank]), replicas=[rollout])
    return SimpleNamespace(rank=rank, rollout=rollout, sync=AuditedSync(manager), told=told)


def sync(run: SimpleNamespace) -> dict[str, float]:
    run.sync.before()
    run.rollout.load(run.rank.stream())
    return run.sync.after()


def logged() -> dict[str, float]:
    step = SimpleNamespace(metrics={})
    add_sync_metrics(step)
    return step.metrics


def test_the_first_sync_is_audited_and_teaches_what_may_go_in_float16(run):
    found = sync(run)
    seconds = found["sync/audit_seconds"]
    assert found == {"sync/audit_ok": 1.0, "sync/audit_seconds": seconds, "sync/probe_abs_diff": 0.0}
    (line,) = run.told
    assert "2 tensors, 0.0 MB, arrived and are held as sent by 1 workers; the probe of 2 tokens agrees" in line
    assert line.endswith("From now on they go in float16, but for gate (held in float32)")
    assert logged().keys() == {"sync/audit_ok", "sync/audit_seconds", "sync/probe_abs_diff"}
    run.sync.before()
    assert {name: tensor.dtype for name, tensor in run.rank.stream()} == {"gate": torch.float32, "norm": torch.float16}


def test_every_second_sync_is_audited_and_bytes_add_up_until_they_are_logged(run):
    audited = ["sync/audit_ok" in sync(run) for _ in range(5)]
    assert audited == [True, False, True, False, True]
    assert run.rollout.audits == 3
    assert logged()["sync/bytes"] == 4 * (2 * 8 + 4 * 8), "of the four syncs after the first"
    assert logged() == {}
    sync(run)
    assert logged()["sync/bytes"] == 2 * 8 + 4 * 8


def test_with_interval_0_only_the_first_is_audited(run):
    run = build(run.told, audit_interval=0)
    assert ["sync/audit_ok" in sync(run) for _ in range(4)] == [True, False, False, False]


def test_a_value_that_verl_logs_itself_is_left_alone(run):
    sync(run), sync(run)
    step = SimpleNamespace(metrics={"sync/bytes": 7.0})
    add_sync_metrics(step)
    assert step.metrics["sync/bytes"] == 7.0


def test_an_overflow_stops_the_run_by_the_tensors_name(run):
    sync(run)
    run.rank.state["gate"][0] = 1e6  # held in float32
    sync(run)
    run.rank.state["norm"][:2] = 1e5
    with pytest.raises(WeightSyncError, match=r"norm \(2 of 8, largest magnitude 100000\)") as caught:
        sync(run)
    assert "would not run the weights that were trained" in str(caught.value)
    assert "gate" not in str(caught.value)


def test_an_overflow_in_the_first_sync_is_judged_by_what_the_rollout_holds(run):
    run.rank.state["gate"][0] = 1e6
    sync(run)
    other = build(run.told)
    other.rank.state["norm"][0] = -1e6
    with pytest.raises(WeightSyncError, match="norm"):
        sync(other)


@pytest.mark.parametrize("policy", ("clamp", "ignore"))
def test_other_policies_go_on_and_count(run, policy):
    run = build(run.told, on_overflow=policy, audit_interval=0)
    sync(run)
    run.rank.state["norm"][0] = 1e5
    assert sync(run)["sync/overflow_values"] == 1.0
    assert run.rollout.held["norm"][0] == (65504.0 if policy == "clamp" else float("inf"))


def test_a_stream_that_changes_on_the_way_stops_the_run(run):
    run.sync.before()
    run.rollout.load([(name, tensor + 1) for name, tensor in run.rank.stream()])
    with pytest.raises(WeightSyncError, match="has other values than actor rank 0 sent: gate, norm|norm, gate"):
        run.sync.after()


def test_a_weight_that_changes_after_it_was_loaded_stops_the_run(run):
    run.sync.before()
    run.rollout.load(run.rank.stream())
    run.rollout.held["norm"][3] += 1
    with pytest.raises(WeightSyncError, match=r"does not hold what it got: norm \(in norm\)"):
        run.sync.after()


def test_what_was_left_out_is_told_once(run):
    run.rollout.held["spare"] = torch.nn.Parameter(torch.ones(3))
    sync(run), sync(run), sync(run)
    assert sum("did not write: spare" in line for line in run.told) == 1


def test_a_stale_kernel_is_told_by_the_probe(run):
    run.rollout.probe = lambda tokens: [-3.0, -4.0]
    with pytest.raises(WeightSyncError, match="rollout replica 0 holds the weights and computes with others"):
        sync(run)


def test_bfloat16_on_either_side_has_ten_times_the_tolerance(run):
    run.rollout.probe = lambda tokens: [-1.3, -2.3]
    run.rank.engine.engine_config.mixed_precision["verl_fp16"]["dtype"] = "bfloat16"
    assert sync(run)["sync/probe_abs_diff"] == pytest.approx(0.3)


def test_a_model_that_cannot_be_probed_is_told_of_and_goes_on(run, monkeypatch):
    def fail(actor):
        raise WeightSyncError("the model wants an image")

    monkeypatch.setattr(audited_sync, "_probe", fail)
    found = sync(run)
    assert found["sync/audit_ok"] == 1.0 and "sync/probe_abs_diff" not in found
    assert any("goes without its probe" in line and "wants an image" in line for line in run.told)


def test_clamp_holds_in_the_first_sync_too(run):
    run = build(run.told, on_overflow="clamp")
    run.rank.state["norm"][:2] = torch.tensor([1e5, -1e5])
    sync(run)
    assert run.rollout.held["norm"][:2].tolist() == [65504.0, -65504.0]


def test_each_manager_has_learned_from_its_own_rollout(run):
    """verl's separate_async mode has two, with the same ranks."""
    other = SimpleNamespace(rank=run.rank, rollout=Rollout(), told=run.told)
    other.rollout.probe = lambda tokens: [-1.0, -2.0]
    other.rollout.held = {name: tensor.float() for name, tensor in other.rollout.held.items()}
    other.sync = AuditedSync(SimpleNamespace(actor_wg=run.sync._manager.actor_wg, replicas=[other.rollout]))
    sync(run), sync(other), sync(run)
    run.sync.before()
    assert dict(run.rank.stream())["norm"].dtype == torch.float16
    other.sync.before()
    assert dict(run.rank.stream())["norm"].dtype == torch.float32


@pytest.mark.parametrize("said", ([], WeightSyncError("the rollout was aborted")))
def test_a_rollout_that_cannot_be_probed_is_told_of_and_goes_on(run, said):
    def probe(tokens):
        if isinstance(said, Exception):
            raise said
        return said

    run.rollout.probe = probe
    found = sync(run)
    assert found["sync/audit_ok"] == 1.0 and "sync/probe_abs_diff" not in found
    assert any("goes without its probe" in line for line in run.told)
    assert not any("agrees" in line for line in run.told)


def test_a_trainer_without_a_read_back_is_told_at_once(run, monkeypatch):
    monkeypatch.setattr(audited_sync, "read_back_done", False)
    monkeypatch.setattr(audited_sync, "_V1_TRAINER", "not imported here")
    run.rollout.probe = lambda tokens: [-3.0, -4.0]
    with pytest.raises(WeightSyncError, match="computes with others"):
        sync(run)


def test_without_the_flag_in_the_workers_nothing_is_asked_of_the_rollout(run):
    run.rank.engine.engine_config.mixed_precision = None
    run.sync.before()
    assert run.sync.after() == {}
    assert run.rollout.audits == 0


def test_a_rollout_without_our_methods_is_named(run):
    run.sync._manager.replicas = [SimpleNamespace(replica_rank=3, servers=[SimpleNamespace()])]
    with pytest.raises(WeightSyncError, match="rollout replica 3 has no method verl_fp16_begin_audit"):
        run.sync.before()


def test_what_is_wrong_before_the_read_back_is_told_after_it(run, monkeypatch):
    monkeypatch.setattr(audited_sync, "read_back_done", False)
    run.rollout.probe = lambda tokens: [-3.0, -4.0]
    assert sync(run) == {}
    with pytest.raises(WeightSyncError, match="computes with others"):
        audited_sync.raise_deferred()
    audited_sync.raise_deferred()


def test_and_at_the_next_sync_at_the_latest(run, monkeypatch):
    monkeypatch.setattr(audited_sync, "read_back_done", False)
    run.sync._manager.replicas = [SimpleNamespace(replica_rank=3, servers=[SimpleNamespace()])]
    assert sync(run).keys() == set()
    with pytest.raises(WeightSyncError, match="rollout replica 3 has no method"):
        sync(run)
