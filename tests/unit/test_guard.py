"""Each rule of the guard: what it refuses or warns of, that its fix removes the finding, and what it lets pass."""

from __future__ import annotations

import json

import pytest
from guard_configurations import ACTOR, CORRECTION, CRITIC, LOSS, MODEL, REF, ROLLOUT, VLLM, apply, check, configuration

from verl_fp16 import guard
from verl_fp16.fault_injection import Fault
from verl_fp16.findings import Finding, render_errors, render_warnings
from verl_fp16.guard import model
from verl_fp16.settings import LossScaleSettings, Settings
from verl_fp16.weight_sync_settings import WeightSyncSettings

MIXED = f"{ACTOR}.mixed_precision"
CONTRADICTIONS = (
    # overrides; severity, key, a part of why
    (f"{MIXED}.param_dtype=bf16", "error", f"{MIXED}.param_dtype", "the actor would compute in bfloat16"),
    (f"{REF}.mixed_precision.param_dtype=half", "error", f"{REF}.mixed_precision.param_dtype", "no dtype to verl"),
    (f"~{CRITIC}.mixed_precision.param_dtype", "error", f"{CRITIC}.mixed_precision.param_dtype", "in bfloat16"),
    (f"{MIXED}.reduce_dtype=fp16", "error", f"{MIXED}.reduce_dtype", "65,504"),
    (f"{MIXED}.buffer_dtype=banana", "error", f"{MIXED}.buffer_dtype", "no dtype to verl"),
    (f"{MIXED}.param_dtyp=fp16", "error", f"{MIXED}.param_dtyp", "did you mean"),
    (f"{MIXED}.verl_fp16.dtype=bfloat16", "error", f"{MIXED}.verl_fp16", "differs from the node verl_fp16"),
    (f"{CRITIC}.model_dtype=fp16", "error", f"{CRITIC}.model_dtype", "AdamW"),
    (f"{ACTOR}.dtype=bfloat16", "error", f"{ACTOR}.dtype", "does not read this key"),
    (f"{ACTOR}.forward_only=true", "error", f"{ACTOR}.forward_only", "neither optimizer nor loss scaler"),
    (f"{REF}.forward_only=false", "error", f"{REF}.forward_only", "would get an optimizer"),
    (f"{ACTOR}.dtypes=fp16", "error", f"{ACTOR}.dtypes", "did you mean"),
    ("actor_rollout_ref.actor.strategy=veomni", "error", "actor_rollout_ref.actor.strategy", "of veomni"),
    ("critic.strategy=torchtitan", "error", "critic.strategy", "of torchtitan"),
    ("critic.strategy=banana", "error", "critic.strategy", "no engine 'banana'"),
    ("model_engine=megatron", "error", "model_engine", "of megatron"),
    (f"{ACTOR}.qat.enable=true", "error", f"{ACTOR}.qat.enable", "4-bit"),
    (
        f"{ACTOR}.turbo_config.distributed.fsdp_plan.param_dtype=fp16",
        "error",
        f"{ACTOR}.turbo_config.distributed.fsdp_plan.param_dtype",
        "fsdp_turbo",
    ),
    (
        f"{ACTOR}.use_no_sync_for_gradient_accumulation=true",
        "error",
        f"{ACTOR}.use_no_sync_for_gradient_accumulation",
        "FSDP1",
    ),
    ("critic.optim.optimizer_impl=torchao.optim", "warning", "critic.optim.optimizer_impl", "8 bits"),
    ("critic.optim.optimizer=Lion", "warning", "critic.optim.optimizer", "float32"),
    ("critic.optim.override_optimizer_config=fused", "error", "critic.optim.override_optimizer_config", "a mapping"),
    (
        "critic.optim.override_optimizer_config.exp_avg_dtype=bf16",
        "error",
        "critic.optim.override_optimizer_config.exp_avg_dtype",
        "optimizer's state",
    ),
    (f"{ROLLOUT}.dtype=bfloat16", "error", f"{ROLLOUT}.dtype", "vLLM would compute in bfloat16"),
    (f"{ROLLOUT}.dtype=fp16", "error", f"{ROLLOUT}.dtype", "no dtype to vLLM"),
    (f"{ROLLOUT}.dtype=auto", "error", f"{ROLLOUT}.dtype", "from the checkpoint"),
    (f"~{ROLLOUT}.dtype", "error", f"{ROLLOUT}.dtype", "in bfloat16"),
    (f"{VLLM}.dtype=bfloat16", "error", f"{VLLM}.dtype", "vLLM would compute in bfloat16"),
    (f"{VLLM}.kv_cache_dtype=fp8", "error", f"{VLLM}.kv_cache_dtype", "keys and values"),
    (f"{VLLM}.logprobs_mode=raw_logits", "error", f"{VLLM}.logprobs_mode", "would not report log-probs"),
    (f"{VLLM}.quantization=fp8", "error", f"{VLLM}.quantization", "does not cover"),
    (f"{VLLM}.hf_overrides.dtype=bfloat16", "error", f"{VLLM}.hf_overrides", "changes the dtype"),
    (f"{ROLLOUT}.engine_kwargs.sglang.dtype=half", "error", f"{ROLLOUT}.engine_kwargs.sglang.dtype", "sglang only"),
    (f"{ROLLOUT}.quantization=fp8", "error", f"{ROLLOUT}.quantization", "quantized"),
    (f"{ROLLOUT}.calculate_log_probs=false", "error", f"{ROLLOUT}.calculate_log_probs", "neither measured"),
    (f"{ROLLOUT}.logprobs_mode=raw_logprobs", "warning", f"{ROLLOUT}.logprobs_mode", "temperature"),
    (f"{ROLLOUT}.top_p=0.9", "warning", f"{ROLLOUT}.top_p", "truncated"),
    (f"{ROLLOUT}.top_k=50", "warning", f"{ROLLOUT}.top_k", "truncated"),
    (f"{ROLLOUT}.name=sglang", "error", f"{ROLLOUT}.name", "could not be proved"),
    (f"{ROLLOUT}.load_format=bitsandbytes", "error", f"{ROLLOUT}.load_format", "quantized weights"),
    (f"{ROLLOUT}.disaggregation.enabled=true", "error", f"{ROLLOUT}.disaggregation.enabled", "not read back"),
    (f"{VLLM}.config=/x.yaml", "error", f"{VLLM}.config", "wins over"),
    (f"{VLLM}.worker_cls=a.B", "error", f"{VLLM}.worker_cls", "wins over"),
    (f"{ROLLOUT}.name=hf", "error", f"{ROLLOUT}.name", "autocast to bfloat16"),
    (f"{ROLLOUT}.name=banana", "error", f"{ROLLOUT}.name", "no rollout"),
    (f"{ROLLOUT}.temperature=0", "error", f"{ROLLOUT}.temperature", "65,504"),
    (f"{ROLLOUT}.temperature=0.0009", "error", f"{ROLLOUT}.temperature", "65,504"),
    (f"{ROLLOUT}.checkpoint_engine.backend=mooncake", "error", f"{ROLLOUT}.checkpoint_engine.backend", "bfloat16"),
    (f"{ROLLOUT}.checkpoint_engine.backend=mine", "warning", f"{ROLLOUT}.checkpoint_engine.backend", "not know"),
    (f"{MODEL}.lora_rank=8", "error", "actor_rollout_ref.actor.strategy", "finds no adapters"),
    (f"{MODEL}.lora.dtype=fp16", "error", f"{MODEL}.lora.dtype", "Megatron"),
    (f"{MODEL}.override_config.torch_dtype=fp16", "error", f"{MODEL}.override_config.torch_dtype", "from here"),
    (f"{MODEL}.use_liger=true", "warning", f"{MODEL}.use_liger", "training only"),
    (f"{MODEL}.use_fused_kernels=banana", "error", f"{MODEL}.use_fused_kernels", "true or false"),
    (f"{MODEL}.use_fused_kernels=true", "error", f"{MODEL}.fused_kernel_options.impl_backend", "no such backend"),
    ("critic.model.use_fused_kernels=true", "error", "critic.model.use_fused_kernels", "a critic has none"),
    (f"{CORRECTION}.bypass_mode=true", "error", f"{CORRECTION}.bypass_mode", "plain PPO"),
    (f"{LOSS}=bypass_mode", "error", LOSS, "takes the old log-probs"),
    (
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=8",
        "warning",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu",
        "other shapes",
    ),
    (f"{ROLLOUT}.log_prob_use_dynamic_bsz=true", "error", f"{ROLLOUT}.log_prob_use_dynamic_bsz", "equal"),
    (f"{ROLLOUT}.max_model_len=1535", "warning", f"{ROLLOUT}.max_model_len", "answers are cut"),
    (f"{ROLLOUT}.n=1", "warning", f"{ROLLOUT}.n", "bare reward"),
)


def test_what_the_flag_sets_has_no_findings():
    for train, rollout in (("float16", "float16"), ("bfloat16", "float16"), ("bfloat16", "float32"), ("float32",) * 2):
        assert check((), train=train, rollout=rollout) == []


@pytest.mark.parametrize(("override", "severity", "key", "why"), CONTRADICTIONS, ids=lambda value: None)
def test_a_contradiction_is_found_and_its_fix_removes_it(override, severity, key, why):
    found = [finding for finding in check((override,)) if finding.key == key]
    assert [finding.severity for finding in found] == [severity], found
    finding = found[0]
    assert why in finding.why
    text = render_errors(found) if severity == "error" else render_warnings(found)
    assert f"1. {key}=" in text and finding.why in text and all(fix in text for fix in finding.fix)
    assert finding.fix, "no override removes it"
    assert finding.key not in {left.key for left in check((override, *finding.fix)) if left.severity == "error"}
    assert finding not in check((override, *finding.fix))


def test_every_rule_is_among_these_or_has_a_test_of_its_own():
    """A rule that nothing here sets off could be lost unseen."""
    own = {"idle_scaler", "float16_fits", "temperature_of_raw_log_probs", "teachers", "merged_lora"}
    own |= {"entry_point", "trainers", "quantized_model", "static_scale", "planted_faults", "idle_critic_scale"}
    own |= {"large_weights", "group_filtering", "unseen_chat_template", "overlong_buffer"}
    config, settings = configuration()
    cases = [guard.Case(apply(config, (row[0],)), settings, "0.9.1") for row in CONTRADICTIONS]
    assert {rule.__name__ for rule in guard.RULES if not any(list(rule(case)) for case in cases)} == own


def test_all_contradictions_come_out_at_once():
    found = check((f"{ROLLOUT}.dtype=bfloat16", f"{ACTOR}.dtype=bfloat16", f"{CRITIC}.model_dtype=bf16"))
    text = render_errors(found, "training float16, rollout float16")
    assert "3 settings contradict the precision flag (training float16, rollout float16)" in text
    assert [line[:2] for line in text.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3."]


def test_contradictions_are_judged_against_the_declared_pair():
    override = (f"{ROLLOUT}.dtype=float16",)
    assert check(override, train="bfloat16", rollout="float16") == []
    assert [finding.fix for finding in check(override, train="bfloat16", rollout="bfloat16")] == [
        (f"{ROLLOUT}.dtype=bfloat16",)
    ]


def test_spellings_of_the_declared_dtype_pass():
    same = (f"{MIXED}.param_dtype=fp16", f"{ACTOR}.dtype=16", f"{ROLLOUT}.dtype=half", f"{VLLM}.kv_cache_dtype=auto")
    assert check(same) == []


@pytest.mark.parametrize("trainer", ((), ("trainer.use_v1=false",)))
def test_bypass_mode_passes_in_both_places_on_either_trainer(trainer):
    """The legacy trainer sets the loss too late for its workers: tests/contract/test_recipe_algorithms.py."""
    both = (f"{CORRECTION}.bypass_mode=true", f"{LOSS}=bypass_mode")
    correction = "+actor_rollout_ref.actor.policy_loss.rollout_correction={bypass_mode: true, rollout_is: token}"
    assert check((*both, correction, *trainer)) == []
    assert [finding.key for finding in check((*both, *trainer))] == [f"{CORRECTION}.rollout_is"]
    assert [finding.key for finding in check((both[0], *trainer))] == [both[0].partition("=")[0]]
    other = correction.replace("token", "sequence")
    (finding,) = check((*both, other, *trainer))
    assert (finding.severity, finding.key, finding.value) == ("error", f"{CORRECTION}.rollout_is", "token")
    assert "rollout_correction.rollout_is, which is sequence" in finding.why
    assert check((*both, other, *finding.fix, *trainer)) == []


def test_temperature_matters_with_raw_log_probs_only():
    hot = f"{ROLLOUT}.temperature=0.7"
    assert check((hot,)) == []
    raw = check((hot, f"{ROLLOUT}.logprobs_mode=raw_logprobs"))
    assert {finding.key for finding in raw} == {f"{ROLLOUT}.temperature", f"{ROLLOUT}.logprobs_mode"}
    assert {finding.severity for finding in raw} == {"warning"}


def test_a_small_temperature_is_refused_in_float16_only():
    for temperature in (1e-3, 0.7, 1.0):
        assert check((f"{ROLLOUT}.temperature={temperature}",)) == []
    assert check((f"{ROLLOUT}.temperature=0",), train="bfloat16") == []


def test_deferred_gradients_of_fsdp1_are_warned_of_in_bfloat16_and_right_on_fsdp2():
    defer = f"{ACTOR}.use_no_sync_for_gradient_accumulation=true"
    assert [finding.severity for finding in check((defer,), train="bfloat16")] == ["warning"]
    assert check((defer, "actor_rollout_ref.actor.strategy=fsdp2")) == []
    assert check((f"~{ACTOR}.use_no_sync_for_gradient_accumulation",), verl="0.9.0") == [], "which has no such key"


FUSED = (f"{MODEL}.use_fused_kernels=true", "actor_rollout_ref.actor.use_fused_kernels=true")
BACKEND = f"{MODEL}.fused_kernel_options.impl_backend"


@pytest.mark.parametrize(
    ("backend", "verl", "severities"),
    (
        ("torch", "0.9.1", []),
        ("triton", "0.9.1", ["warning"]),
        ("liger", "0.9.1", ["warning"]),
        ("liger", "0.9.0", ["error"]),
        ("banana", "0.9.1", ["error"]),
    ),
)
def test_of_fused_kernels_those_of_torch_pass(backend, verl, severities):
    found = check((*FUSED, f"{BACKEND}={backend}"), verl=verl)
    assert [finding.severity for finding in found if finding.key == BACKEND] == severities
    assert check((f"{BACKEND}={backend}",)) == [], "read only with fused kernels"


@pytest.mark.parametrize(("tied", "strategy", "refused"), ((False, "fsdp2", 1), (False, "fsdp", 0), (True, "fsdp2", 0)))
def test_fused_kernels_need_a_head_that_fsdp2_does_not_shard_by_itself(tmp_path, tied, strategy, refused):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "tie_word_embeddings": tied}))
    strategies = (f"actor_rollout_ref.actor.strategy={strategy}", f"actor_rollout_ref.ref.strategy={strategy}")
    found = check((*FUSED, f"{BACKEND}=torch", f"{MODEL}.path={tmp_path}", *strategies))
    assert [finding.severity for finding in found] == ["error"] * refused


def test_fused_kernels_of_the_oldest_release_need_packed_batches():
    padded = (*FUSED, f"{BACKEND}=torch", f"{MODEL}.use_remove_padding=false")
    assert f"{MODEL}.use_fused_kernels" in {finding.key for finding in check(padded, verl="0.8.0")}
    assert check(padded) == []


def test_dynamic_batches_are_compared_by_their_limits():
    dynamic = ("actor_rollout_ref.actor.use_dynamic_bsz=true", f"{ROLLOUT}.log_prob_use_dynamic_bsz=true")
    assert check(dynamic) == []
    assert [finding.key for finding in check((*dynamic, f"{ROLLOUT}.log_prob_max_token_len_per_gpu=9"))] == [
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu"
    ]


def test_a_teacher_in_another_dtype_is_warned_of():
    key = "distillation.teacher_models.one.inference.dtype"
    assert [(finding.severity, finding.key) for finding in check((f"{key}=bfloat16",))] == [("warning", key)]
    assert check((f"{key}=float16",)) == []
    assert check((f"{key}=bfloat16", "++distillation.enabled=false")) == []


def test_settings_of_a_scaler_that_is_not_there_are_warned_of():
    settings = Settings("bfloat16", "float16", loss_scale=LossScaleSettings(init=8.0))
    found = check((), train="bfloat16", settings=settings)
    assert [(finding.severity, finding.key) for finding in found] == [("warning", "verl_fp16.loss_scale.init")]


def test_settings_that_move_a_static_scale_are_warned_of():
    static = LossScaleSettings(mode="static", init=8.0, growth_interval=7, max=64.0)
    found = check((), settings=Settings(loss_scale=static, critic_loss_scale=static))
    assert [(finding.severity, finding.key, finding.fix) for finding in found] == [
        ("warning", "verl_fp16.loss_scale.growth_interval", ("verl_fp16.loss_scale.growth_interval=400",)),
        ("warning", "verl_fp16.loss_scale.max", ("verl_fp16.loss_scale.max=null",)),
    ], "the critic follows the actor"
    dynamic = LossScaleSettings(growth_interval=7)
    assert check((), settings=Settings(loss_scale=dynamic, critic_loss_scale=static))[0].key.endswith(
        "critic_loss_scale.max"
    ), "its interval is the actor's, who reads it"


@pytest.mark.parametrize("policy", ("clamp", "ignore"))
def test_large_weights_that_the_actor_itself_cannot_hold_are_warned_of(policy):
    sync = WeightSyncSettings(on_overflow=policy)
    (found,) = check((), settings=Settings(sync=sync))
    assert (found.severity, found.key) == ("warning", "verl_fp16.sync.on_overflow")
    assert "the actor computes in float16 too" in found.why
    assert check((), settings=Settings("bfloat16", "float16", sync=sync), train="bfloat16") == []
    assert check((), settings=Settings(sync=WeightSyncSettings())) == []


def test_planted_faults_are_refused_unless_the_environment_allows_them(monkeypatch):
    faulty = Settings(fault_injection=(Fault("loss", [1]),))
    monkeypatch.delenv("VERL_FP16_ALLOW_FAULT_INJECTION", raising=False)
    (refused,) = check((), settings=faulty)
    assert (refused.severity, refused.key) == ("error", "verl_fp16.fault_injection")
    assert "VERL_FP16_ALLOW_FAULT_INJECTION=1" in refused.advice
    monkeypatch.setenv("VERL_FP16_ALLOW_FAULT_INJECTION", "1")
    assert check((), settings=faulty) == []
    without_scaler = Settings("bfloat16", "bfloat16", fault_injection=(Fault("loss", [1]),))
    (refused,) = check((), train="bfloat16", rollout="bfloat16", settings=without_scaler)
    assert refused.severity == "error" and "no loss scaler" in refused.why


def test_faults_that_nothing_would_plant_are_refused(monkeypatch):
    monkeypatch.setenv("VERL_FP16_ALLOW_FAULT_INJECTION", "1")
    faulty = Settings(fault_injection=(Fault("loss", [1], rank=1), Fault("loss", [1], role="critic")))
    two = ("trainer.nnodes=1", "trainer.n_gpus_per_node=2", "critic.enable=true")
    assert check(two, settings=faulty) == []
    one = ("trainer.nnodes=1", "trainer.n_gpus_per_node=1", "critic.enable=false")
    assert [finding.key for finding in check(one, settings=faulty)] == [
        "verl_fp16.fault_injection[0].rank",
        "verl_fp16.fault_injection[1].role",
    ]


def test_settings_of_the_critics_scaler_without_a_critic_are_warned_of():
    settings = Settings(critic_loss_scale=LossScaleSettings(init=8.0))
    (found,) = check(("critic.enable=false",), settings=settings)
    assert (found.severity, found.key) == ("warning", "verl_fp16.critic_loss_scale.init")
    assert check(("critic.enable=true",), settings=settings) == []


def test_a_role_without_its_engine_is_refused():
    assert [finding.key for finding in check((f"~{REF}",))] == [REF]
    assert check(("~actor_rollout_ref.ref",)) == [], "a run without a reference policy"


def test_trainers_whose_dtypes_are_not_read_back_are_warned_of():
    for entry in ("verl.experimental.fully_async_policy.fully_async_main", "verl.trainer.main_ppo_sync"):
        assert [(finding.severity, finding.value) for finding in check((), entry=entry)] == [("warning", entry)]
    assert check((), entry="verl.trainer.main_ppo") == []


def test_merged_lora_is_refused_where_the_release_sends_it_without_its_adapters():
    merged = (f"{MODEL}.lora.merge=true",)
    assert check(merged, verl="0.9.0") == check(merged, verl="0.9.1") == []
    (finding,) = check(merged, verl="0.8.0")
    assert (finding.severity, finding.key) == ("error", f"{MODEL}.lora.merge")
    assert "taken the adapters out" in finding.why
    assert check((*merged, *finding.fix), verl="0.8.0") == check((), verl="0.8.0") == []


def test_an_entry_point_without_an_actor_is_refused():
    found = guard.check({"verl_fp16": {"train_dtype": "float16"}, "model": {}}, Settings(), verl="0.9.1")
    assert [finding.key for finding in found] == ["verl_fp16"]
    assert "PPO entry points" in found[0].why


@pytest.mark.parametrize(("kind", "refused"), (("gemma3_text", True), ("glm4", True), ("qwen3", False)))
def test_a_model_that_overflows_float16_is_refused(tmp_path, kind, refused):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    override = (f"{MODEL}.path={tmp_path}",)
    assert [finding.key for finding in check(override)] == [f"{MODEL}.path"] * refused
    assert check(override, train="bfloat16", rollout="bfloat16") == []


def test_vllms_own_list_is_read_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    file = tmp_path / "config" / "model.py"
    file.write_text('import nothing_there\n_FLOAT16_NOT_SUPPORTED_MODELS = {"new_model": "why"}\n')
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: spec)
    model.refused_in_float16.cache_clear()
    try:
        assert model.refused_in_float16() == {"new_model"}
        file.write_text("")
        model.refused_in_float16.cache_clear()
        assert model.refused_in_float16() == model.REFUSED_IN_FLOAT16
    finally:
        model.refused_in_float16.cache_clear()


def test_a_finding_has_to_say_what_to_do():
    with pytest.raises(ValueError, match="has to say what to do"):
        Finding("error", "a", 1, "because")


def test_a_quantized_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}')
    found = check((f"actor_rollout_ref.model.path={tmp_path}",))
    assert [(finding.key, "quantized" in finding.why) for finding in found] == [("actor_rollout_ref.model.path", True)]
