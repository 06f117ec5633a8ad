"""Declaration against reports: every difference names who and what; what is as declared is silent."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import pytest
from rich.console import Console

from verl_fp16.readback import table
from verl_fp16.readback.compare import (
    ROLLOUT_FIELDS,
    TRAINING_FIELDS,
    Answer,
    ReadBackError,
    differences,
    raise_if_any,
)
from verl_fp16.settings import LossScaleSettings, Settings

FP16 = Settings(critic_loss_scale=LossScaleSettings(init=4096.0))
VERSIONS = {"verl_fp16": "0.1.0", "verl": "0.9.1"}
HOOKS = {"engine.loss_scaler": "applied", "trainer.fit": "pending"}


def report(pid: int, rank: int | None = None, **roles) -> dict:
    return {
        "host": "node7",
        "pid": pid,
        "rank": rank,
        "versions": dict(VERSIONS),
        "hooks": dict(HOOKS),
        "roles": roles,
    }


def training_fields(settings: Settings, role: str) -> dict:
    dtype = settings.train_dtype
    scale = {"actor": settings.loss_scale, "critic": settings.critic_loss_scale}.get(role)
    scaled = scale is not None and dtype == "float16"
    fields = {
        "engine": "FSDPEngineWithLMHead",
        "autocast": dtype,
        "fsdp": ["FSDP1"],
        "fsdp_param": [dtype],
        "fsdp_reduce": ["float32"],
        "fsdp_buffer": ["float32"],
        "parameters": ["float32"],
        "master": None if role == "ref" else ["float32"],
        "device": ["cpu"],
        "attention": ["sdpa"],
        "scaler": "LossScaler" if scaled else None,
        "scaler_device": "cpu" if scaled else None,
        "scaler_enabled": True if scaled else None,
        "scale": scale.init if scaled else None,
        "scaler_settings": asdict(scale) if scaled else None,
        "stuck": False,
        "last_skip": None,
        "last_skip_line": "",
    }
    assert set(fields) == set(TRAINING_FIELDS)
    return fields


def rollout_fields(settings: Settings) -> dict:
    fields = {
        "model": "Qwen3ForCausalLM",
        "model_dtype": settings.rollout_dtype,
        "parameters": [settings.rollout_dtype],
        "kv_cache": [settings.rollout_dtype],
        "kv_cache_setting": "auto",
        "device": ["cpu"],
    }
    assert set(fields) == set(ROLLOUT_FIELDS)
    return fields


def good(settings: Settings = FP16) -> list[Answer]:
    """The trainer, two ranks with actor, reference policy and critic, one replica with its server and worker."""
    roles = ("actor", "ref", "critic")
    return [
        Answer("trainer", report=report(1)),
        *(
            Answer(
                f"training worker {rank} of 2",
                roles,
                report(10 + rank, rank, **{role: training_fields(settings, role) for role in roles}),
            )
            for rank in (0, 1)
        ),
        Answer("rollout replica 0, server", report=report(20)),
        Answer("rollout replica 0, worker 0", ("rollout",), report(21, 0, rollout=rollout_fields(settings))),
    ]


def silent(answers: list[Answer], index: int, failure: str, where: str = "") -> list[Answer]:
    answers = list(answers)
    answers[index] = Answer(answers[index].who, answers[index].roles, failure=failure, where=where)
    return answers


def planted(index: int, path: str, value, settings: Settings = FP16) -> list[str]:
    answers = copy.deepcopy(good(settings))
    *parents, last = path.split("/")
    part = answers[index].report
    for parent in parents:
        part = part[parent]
    part[last] = value
    return [str(difference) for difference in differences(settings, answers)]


@pytest.mark.parametrize(
    "settings",
    (
        FP16,
        Settings(train_dtype="bfloat16", rollout_dtype="bfloat16"),
        Settings(train_dtype="bfloat16", rollout_dtype="float16"),
        Settings(train_dtype="bfloat16", rollout_dtype="float32"),
        Settings(train_dtype="float32", rollout_dtype="float32"),
    ),
    ids=lambda settings: f"{settings.train_dtype}-{settings.rollout_dtype}",
)
def test_what_is_as_declared_is_silent(settings):
    assert differences(settings, good(settings)) == []


RANK_1, SERVER, ROLLOUT = 2, 3, 4


@pytest.mark.parametrize(
    ("role", "field", "value"),
    (
        ("actor", "autocast", "bfloat16"),
        ("actor", "fsdp_param", ["bfloat16", "float16"]),
        ("critic", "fsdp_reduce", ["float16"]),
        ("actor", "fsdp_buffer", ["float16"]),
        ("ref", "parameters", ["bfloat16"]),
        ("actor", "master", ["float16"]),
        ("actor", "scaler", "ShardedGradScaler"),
        ("actor", "scaler", None),
        ("ref", "scaler", "LossScaler"),
        ("critic", "scaler_enabled", False),
        ("critic", "scaler_settings", asdict(LossScaleSettings())),
    ),
)
def test_a_training_field_that_differs_is_named(role, field, value):
    (found,) = planted(RANK_1, f"roles/{role}/{field}", value)
    assert found.startswith(f"{role} rank 1 (host node7, pid 11): {field} is ")
    assert "declared" in found


@pytest.mark.parametrize("field", ("scale", "attention", "device", "scaler_device", "fsdp", "engine"))
def test_ranks_that_differ_among_themselves_are_named(field):
    (found,) = planted(RANK_1, f"roles/actor/{field}", ["other"] if field != "scale" else 32768.0)
    assert found.startswith(f"actor rank 1 (host node7, pid 11): {field} is ")
    assert "on actor rank 0 (host node7, pid 10)" in found


@pytest.mark.parametrize(
    ("field", "value"),
    (
        ("model_dtype", "bfloat16"),
        ("parameters", ["bfloat16"]),
        ("parameters", ["float32"]),
        ("parameters", ["bfloat16", "float16"]),
        ("kv_cache", ["bfloat16"]),
        ("kv_cache", ["bfloat16", "float16"]),
    ),
)
def test_a_rollout_field_that_differs_is_named(field, value):
    (found,) = planted(ROLLOUT, f"roles/rollout/{field}", value)
    assert found.startswith("rollout replica 0, worker 0: rollout rank 0 (host node7, pid 21): " + field)
    assert "declared float16" in found


def test_what_vllm_keeps_in_float32_is_no_difference():
    assert planted(ROLLOUT, "roles/rollout/parameters", ["float16", "float32"]) == []


@pytest.mark.parametrize("found", (["float16", "float8_e4m3fn"], ["float16", "uint8"], ["float16", "float32", "int32"]))
def test_a_quantized_model_is_a_difference(found):
    (difference,) = planted(ROLLOUT, "roles/rollout/parameters", found)
    assert "parameters is" in difference


def test_a_kv_cache_in_another_dtype_is_a_difference_also_where_it_was_asked_for():
    answers = copy.deepcopy(good())
    answers[ROLLOUT].report["roles"]["rollout"].update(kv_cache=["uint8"], kv_cache_setting="fp8")
    assert [difference.what for difference in differences(FP16, answers)] == ["kv_cache"]


def test_a_rank_that_did_not_report_is_named_with_its_place():
    (found,) = differences(FP16, silent(good(), RANK_1, "ModuleNotFoundError: No module named 'verl_fp16'", "host a"))
    assert str(found) == (
        "training worker 1 of 2 (host a) did not report: ModuleNotFoundError: No module named 'verl_fp16'"
    )
    (found,) = differences(FP16, silent(good(), RANK_1, "no answer within 300 s"))
    assert "where it runs is not known" in str(found)


def test_a_rank_without_one_of_its_roles_is_named():
    answers = copy.deepcopy(good())
    del answers[RANK_1].report["roles"]["ref"]
    (found,) = differences(FP16, answers)
    assert "no engine of the role ref" in str(found)
    assert "ref rank 1" in str(found)


@pytest.mark.parametrize(
    ("index", "path", "value", "said"),
    (
        (RANK_1, "hooks/engine.loss_scaler", "pending", "hook engine.loss_scaler is not in place"),
        (RANK_1, "hooks/engine.loss_scaler", "refused: body", "hook engine.loss_scaler is refused: body"),
        (SERVER, "hooks/trainer.fit", "withdrawn: x", "hook trainer.fit is withdrawn: x"),
        (ROLLOUT, "versions/verl", "0.9.0", "version of verl is 0.9.0, the trainer's is 0.9.1"),
        (SERVER, "versions/verl_fp16", "0.0.9", "version of verl_fp16 is 0.0.9"),
    ),
)
def test_hooks_and_versions_of_every_process_count(index, path, value, said):
    (found,) = planted(index, path, value)
    assert said in found
    assert "pid" in found


@pytest.mark.parametrize("status", ("applied", "not needed: the source of this installation carries it"))
def test_a_hook_that_is_in_place_in_either_way_is_no_difference(status):
    assert planted(RANK_1, "hooks/engine.loss_scaler", status) == []


def test_a_pending_engine_hook_is_right_where_there_is_no_engine():
    assert planted(ROLLOUT, "hooks/engine.loss_scaler", "pending") == []


def test_the_error_is_one_line_with_all_and_names_the_file():
    answers = silent(good(), ROLLOUT, "silent")
    answers[RANK_1].report["roles"]["actor"]["autocast"] = "bfloat16"
    with pytest.raises(ReadBackError) as caught:
        raise_if_any(FP16, differences(FP16, answers), "run/read-back.json")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("actor rank 1", "autocast is bfloat16", "rollout replica 0", "run/read-back.json", "float16"):
        assert part in message
    raise_if_any(FP16, [], "")


def test_of_very_many_differences_some_are_listed():
    found = differences(FP16, [good()[0], *[Answer(f"training worker {i}", failure="silent") for i in range(500)]])
    with pytest.raises(ReadBackError, match="and 488 more"):
        raise_if_any(FP16, found, "")


def test_table_folds_equal_ranks_and_shows_the_odd_one():
    def shown(answers) -> list[str]:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table.table(answers))
        return [line.split() for line in capture.get().splitlines() if line.strip()]

    rows = shown(good())
    assert ["actor", "0,", "1", "float16", "float16", "float32", "float32"] in [row[:7] for row in rows]
    assert [row[0] for row in rows].count("actor") == 1
    rollout = next(row for row in rows if row[0] == "rollout")
    assert rollout[3:] == ["float16", "float16", "float16", "cpu"]
    answers = good()
    answers[RANK_1].report["roles"]["actor"]["autocast"] = "bfloat16"
    rows = shown(silent(answers, ROLLOUT, "silent"))
    assert [row[:3] for row in rows if row[0] == "actor"] == [["actor", "0", "float16"], ["actor", "1", "bfloat16"]]
    assert ["rollout", "1", "process", "did", "not", "report"] in rows


def test_the_file_is_written_whole(tmp_path):
    answers = silent(good(), ROLLOUT, "silent")
    path = table.write(tmp_path / "new", FP16, answers, differences(FP16, answers))
    assert path == tmp_path / "new" / "verl_fp16" / "read-back.json"
    content = json.loads(path.read_text())
    assert content["declared"]["train_dtype"] == "float16"
    assert [process["who"] for process in content["processes"]][:2] == ["trainer", "training worker 0 of 2"]
    assert content["processes"][1]["report"]["roles"]["actor"]["master"] == ["float32"]
    assert len(content["differences"]) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]
