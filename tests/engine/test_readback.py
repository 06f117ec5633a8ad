"""What a rank says of its real FSDP engines, and what the comparison makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ranks import on_ranks

from verl_fp16.readback.compare import TRAINING_FIELDS, Answer, differences
from verl_fp16.settings import LossScaleSettings, Settings

STRATEGIES = ("fsdp", "fsdp2")
ROLES = ("actor", "ref", "critic")
FP16 = Settings(critic_loss_scale=LossScaleSettings(init=1024.0))


def reports(model: str, strategy: str) -> dict:
    """This rank's report of a worker with all three roles, as declared; and of one with each of several faults."""
    import torch.distributed as dist
    import verl.workers.engine_workers  # noqa: F401  the class of every worker that has an engine

    from verl_fp16 import standalone
    from verl_fp16.readback.rank import report_training_worker

    def engine(dtype: str = "float16", role: str = "actor", flag: bool = True, scale: float = 65536.0, **kwargs):
        precision = standalone.mixed_precision(dtype, role=role, loss_scale={"init": scale})
        if not flag:
            del precision["verl_fp16"]
        return standalone.build_engine(model, precision=precision, strategy=strategy, **kwargs)

    def of_actor(engine) -> dict:
        return report_training_worker(SimpleNamespace(actor=SimpleNamespace(engine=engine)))

    actor = engine()
    reference = engine(role="ref", forward_only=True)
    critic = engine(role="critic", scale=1024.0, model_type="value_model")
    worker = SimpleNamespace(
        worker_dict={
            "actor_rollout_ref": SimpleNamespace(
                actor=SimpleNamespace(engine=actor), ref=SimpleNamespace(engine=reference)
            ),
            "critic": SimpleNamespace(engine=critic),
        }
    )
    found = {"declared": report_training_worker(worker)}
    tokens = [list(range(7))] * 2
    standalone.train_step(actor, standalone.make_batch(tokens))
    found["after a step"] = report_training_worker(worker)
    found["bf16"] = of_actor(engine("bfloat16" if dist.get_rank() == dist.get_world_size() - 1 else "float16"))
    found["stock scaler"] = of_actor(engine(flag=False))
    found["eager"] = of_actor(engine(attention="eager" if dist.get_rank() == 0 else "sdpa"))
    found["half master"] = of_actor(engine(engine={"model_dtype": "fp16"}))
    return found


def reports_of_both(model: str) -> dict[str, dict]:
    return {strategy: reports(model, strategy) for strategy in STRATEGIES}


@pytest.fixture(scope="module", params=(1, 2), ids=("1 rank", "2 ranks"))
def both(request, tiny_model, tmp_path_factory) -> list[dict[str, dict]]:
    return on_ranks(request.param, reports_of_both, str(tiny_model), folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=STRATEGIES)
def ranks(request, both) -> tuple[str, list[dict]]:
    return request.param, [rank[request.param] for rank in both]


def compared(ranks: list[dict], case: str, roles: tuple[str, ...] = ("actor",)) -> list[str]:
    answers = [Answer(f"training worker {i}", roles, rank[case]) for i, rank in enumerate(ranks)]
    return [str(difference) for difference in differences(FP16, answers)]


@pytest.mark.parametrize("case", ("declared", "after a step"))
def test_all_roles_run_as_declared(ranks, case):
    strategy, reported = ranks
    assert compared(reported, case, ROLES) == []
    for rank, report in enumerate(reported):
        said = report[case]
        assert said["rank"] == rank
        assert said["hooks"]["engine.loss_scaler"] == "applied"
        assert set(said["roles"]) == set(ROLES)
        for role, fields in said["roles"].items():
            assert set(fields) == set(TRAINING_FIELDS)
            assert fields["fsdp"] == ["FSDP1" if strategy == "fsdp" else "FSDP2"]
            assert fields["fsdp_buffer"] == (["float32"] if strategy == "fsdp" else [])
            assert fields["attention"] == ["sdpa"]
            assert fields["device"] == ["cpu"]
            assert fields["scale"] == {"actor": 65536.0, "ref": None, "critic": 1024.0}[role]


def test_one_rank_in_bf16_is_named_and_the_others_are_not(ranks):
    reported = ranks[1]
    last = len(reported) - 1
    found = compared(reported, "bf16")
    assert found
    assert all(difference.startswith(f"actor rank {last} (host ") for difference in found)
    text = "; ".join(found)
    assert "autocast is bfloat16, declared float16" in text
    assert "fsdp_param is bfloat16" in text
    assert "scaler is None, declared LossScaler" in text


def test_verls_own_scaler_is_named(ranks):
    text = "; ".join(compared(ranks[1], "stock scaler"))
    assert "scaler is ShardedGradScaler, declared LossScaler" in text
    assert text.count(";") == len(ranks[1]) - 1, "one difference a rank"


def test_master_weights_in_half_precision_are_named(ranks):
    found = compared(ranks[1], "half master")
    for field in ("parameters", "master"):
        assert any(f"{field} is float16, declared float32" in difference for difference in found)
    assert len(found) == 2 * len(ranks[1])


def test_another_attention_is_seen_and_named_where_ranks_differ_in_it(ranks):
    reported = ranks[1]
    assert [rank["eager"]["roles"]["actor"]["attention"] for rank in reported] == [["eager"], ["sdpa"]][: len(reported)]
    found = compared(reported, "eager")
    assert len(found) == len(reported) - 1
    assert all("attention is sdpa, but eager on actor rank 0" in difference for difference in found)
