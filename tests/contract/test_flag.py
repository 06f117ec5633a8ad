"""The flag, composed by verl's own launcher's configuration: what it sets, what wins, what is refused and when."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from releases import RELEASES, release_environment

from verl_fp16 import plugin
from verl_fp16.hooks import driver
from verl_fp16.hooks.engine import settings_of
from verl_fp16.refusal import GuardError
from verl_fp16.settings import LossScaleSettings, Settings, SettingsError

PRECISIONS = {
    "fp16": ("float16", "float16"),
    "bf16": ("bfloat16", "bfloat16"),
    "bf16_train_fp16_rollout": ("bfloat16", "float16"),
    "bf16_train_fp32_rollout": ("bfloat16", "float32"),
    "fp32": ("float32", "float32"),
}


@pytest.fixture(scope="module", autouse=True)
def verl_with_plugin():
    """verl loads the plugin; the resolver of the flag works from then on."""
    import verl  # noqa: F401

    plugin.require_active()


def composed(*overrides: str, resolve: bool = True):
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True) if resolve else config


def test_the_group_is_complete():
    folder = Path(plugin.__file__).parent / "conf" / "precision"
    assert {path.stem for path in folder.glob("*.yaml")} == set(PRECISIONS)


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_role_runs_in_the_declared_pair(name):
    config, (train, rollout) = composed(f"+precision={name}"), PRECISIONS[name]
    roles = {
        "actor": config["actor_rollout_ref"]["actor"]["fsdp_config"],
        "ref": config["actor_rollout_ref"]["ref"]["fsdp_config"],
        "critic": config["critic"]["fsdp"],
    }
    for role, engine in roles.items():
        mixed = engine["mixed_precision"]
        assert (mixed["param_dtype"], mixed["reduce_dtype"], mixed["buffer_dtype"]) == (train, "fp32", "fp32"), role
        assert engine["model_dtype"] == "fp32", role
        assert mixed["verl_fp16"]["role"] == role
        assert mixed["verl_fp16"]["dtype"] == train
        assert (mixed["verl_fp16"]["loss_scale"] is None) is (role == "ref")
    assert config["actor_rollout_ref"]["rollout"]["dtype"] == rollout
    assert config["actor_rollout_ref"]["rollout"]["calculate_log_probs"] is True
    assert config["actor_rollout_ref"]["model"]["external_lib"] == config["critic"]["model"]["external_lib"]


def test_verl_hands_it_to_the_workers_as_declared(tiny_model):
    """Through verl's own configuration classes, as its workers build them."""
    from hydra.utils import instantiate
    from verl.utils.config import omega_conf_to_dataclass

    config = composed(
        "+precision=fp16",
        "verl_fp16.loss_scale.init=1024",
        "actor_rollout_ref.model.external_lib=json",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"actor_rollout_ref.model.path={tiny_model}",
        resolve=False,
    )
    driver.check_before_start(config)
    OmegaConf.resolve(config)
    nodes = {"actor": config.actor_rollout_ref.actor.fsdp_config, "critic": config.critic.fsdp}
    nodes["ref"] = config.actor_rollout_ref.ref.fsdp_config
    for role, node in nodes.items():
        engine = SimpleNamespace(engine_config=omega_conf_to_dataclass(node))
        rode = settings_of(engine)
        assert (rode["role"], rode["dtype"]) == (role, "float16")
        if role != "ref":
            assert LossScaleSettings(**rode["loss_scale"]).init == 1024
    model = instantiate(config.actor_rollout_ref.model, _convert_="partial")
    assert model.external_lib == ["json", "verl_fp16.required"], "which verl imports, one by one"


def test_siblings_differ_in_nothing_but_dtypes():
    def without_dtypes(name):
        config = OmegaConf.to_yaml(OmegaConf.create(composed(f"+precision={name}")))
        for dtype in ("bfloat16", "float16", "float32"):
            config = config.replace(f"dtype: {dtype}", "dtype: X")
        return config

    texts = {without_dtypes(name) for name in PRECISIONS}
    assert len(texts) == 1


def test_the_flag_changes_only_what_it_says():
    """Everything else of verl's configuration is as verl has it."""
    allowed = (
        "verl_fp16",
        "actor_rollout_ref.model.external_lib",
        "critic.model.external_lib",
        "actor_rollout_ref.actor.fsdp_config.mixed_precision",
        "actor_rollout_ref.actor.fsdp_config.dtype",
        "actor_rollout_ref.ref.fsdp_config.dtype",
        "critic.fsdp.dtype",
        "actor_rollout_ref.ref.fsdp_config.mixed_precision",
        "critic.fsdp.mixed_precision",
        "actor_rollout_ref.rollout.dtype",
        "actor_rollout_ref.rollout.calculate_log_probs",  # off by default in verl 0.8
        "distillation.teacher_models.teacher_model.inference.dtype",  # follows the rollout's in verl's own file
    )

    def flat(node, prefix=""):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix[:-1], node

    plain, flagged = dict(flat(composed())), dict(flat(composed("+precision=fp16")))
    changed = {key for key in plain.keys() | flagged.keys() if plain.get(key, "absent") != flagged.get(key, "absent")}
    assert {key for key in changed if not key.startswith(allowed)} == set()


def test_later_overrides_win():
    config = composed(
        "+precision=fp16",
        "verl_fp16.loss_scale.init=1024",
        "verl_fp16.critic_loss_scale.growth_interval=7",
        "actor_rollout_ref.rollout.dtype=bfloat16",
    )
    actor = config["actor_rollout_ref"]["actor"]["fsdp_config"]["mixed_precision"]["verl_fp16"]["loss_scale"]
    critic = config["critic"]["fsdp"]["mixed_precision"]["verl_fp16"]["loss_scale"]
    assert (actor["init"], actor["growth_interval"]) == (1024, 400)
    assert (critic["init"], critic["growth_interval"]) == (1024, 7), "the critic follows the actor key by key"
    assert config["actor_rollout_ref"]["rollout"]["dtype"] == "bfloat16"


def test_yaml_and_dataclass_have_the_same_keys_and_defaults():
    node = composed("+precision=fp16")["verl_fp16"]
    assert Settings.from_node(node) == Settings()
    assert set(node) == set(vars(Settings()))
    assert set(node["loss_scale"]) == set(vars(Settings().loss_scale)) == set(node["critic_loss_scale"])
    for part in ("sync", "mismatch"):
        assert set(node[part]) == set(vars(getattr(Settings(), part)))


def test_a_recipe_names_the_group_in_its_defaults(tmp_path):
    from hydra import initialize_config_dir

    (tmp_path / "mine.yaml").write_text("defaults:\n  - ppo_trainer\n  - precision: fp16\n  - _self_\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("mine", overrides=["hydra.searchpath=[pkg://verl.trainer.config]", "precision=bf16"])
    assert config.actor_rollout_ref.rollout.dtype == "bfloat16", "a recipe's precision is one word on the command line"


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("+verl_fp16.los_scale.init=3", "did you mean verl_fp16.loss_scale?"),
        ("verl_fp16.loss_scale.init=0.1", "loss_scale.init must be at least"),
        ("verl_fp16.train_dtype=fp17", "train_dtype must be one of"),
        ("verl_fp16.loss_scale=null", "verl_fp16.loss_scale must be a mapping, got None"),
        ("verl_fp16.loss_scale=3", "verl_fp16.loss_scale must be a mapping, got 3"),
        ("verl_fp16=3", "verl_fp16 must be a mapping, got 3"),
    ),
)
def test_wrong_settings_are_refused_by_name(override, message):
    config = composed("+precision=fp16", override, resolve=False)
    with pytest.raises(SettingsError) as caught:
        driver.read_settings(config)
    assert message in str(caught.value)


MIXED = "actor_rollout_ref.actor.fsdp_config.mixed_precision"


@pytest.mark.parametrize(
    ("override", "message"),
    (
        (f"~{MIXED}.verl_fp16", f"1. {MIXED}.verl_fp16=(not set)\n   why: it was removed by an override: the actor"),
        (f"{MIXED}.verl_fp16=null", f"1. {MIXED}.verl_fp16=null\n   why: it was removed"),
        (f"{MIXED}=null", f"1. {MIXED}=null\n   why: it was removed"),
        ("~critic.fsdp.mixed_precision", "1. critic.fsdp.mixed_precision=(not set)"),
        ("~actor_rollout_ref.ref.fsdp_config", "1. actor_rollout_ref.ref.fsdp_config=(not set)"),
        ("~verl_fp16", "1. verl_fp16=null"),
        ("verl_fp16=null", "1. verl_fp16=null"),
        (
            "actor_rollout_ref.actor.fsdp_config.model_dtype=fp16",
            "fix: actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
        ),
    ),
)
def test_a_role_that_is_cut_off_from_the_flag_is_refused(override, message):
    config = composed("+precision=fp16", override, resolve=False)
    with pytest.raises(GuardError) as caught:
        driver.check_before_start(config)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "modules"),
    (
        ("actor_rollout_ref.model.external_lib=mine", ["mine", "verl_fp16.required"]),
        ("actor_rollout_ref.model.external_lib=[a,b]", ["a", "b", "verl_fp16.required"]),
        ("actor_rollout_ref.model.external_lib=null", ["verl_fp16.required"]),
        ("actor_rollout_ref.model.external_lib=[verl_fp16.required,b]", ["verl_fp16.required", "b"]),
    ),
)
def test_the_tripwire_stays_whatever_external_lib_is_set_to(override, modules):
    config = composed("+precision=fp16", override, resolve=False)
    driver.check_before_start(config)
    assert config.actor_rollout_ref.model.external_lib == modules
    assert config.critic.model.external_lib == "verl_fp16.required"


def test_verls_sft_trainer_refuses_the_group():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("sft_trainer_engine", overrides=["+precision=fp16"])
    with pytest.raises(GuardError, match="PPO entry points"):
        driver.check_before_start(config)


@pytest.mark.parametrize(
    ("override", "meant"),
    (
        ("+precison=fp16", "fp16"),
        ("+prec=fp16", "fp16"),
        ("+dtype=bf16", "bf16"),
        ("+fp16=true", "fp16"),
        ("+PRECISION=FP16", "fp16"),
        ("+precison=float16", "fp16"),
        ("+trainer.precision=fp16", "fp16"),
        ("+actor_rollout_ref.precision=fp16", "fp16"),
    ),
)
def test_a_mistyped_flag_is_refused(override, meant):
    key, _, value = override[1:].partition("=")
    value = "True" if value == "true" else value
    with pytest.raises(GuardError, match=rf"unknown key {key}={value}: did you mean .precision={meant}\?"):
        driver.check_before_start(composed(override, resolve=False))


@pytest.mark.parametrize(
    "override", ("+precise=very", "+precisions=4", "+precision_note=fp16", "+fp16=note", "+data.precision=fp32")
)
def test_a_key_of_the_users_own_is_not_taken_for_a_slip(override):
    driver.check_before_start(composed(override, resolve=False))


def test_the_flag_as_a_plain_key_of_a_recipe_is_refused():
    config = composed(resolve=False)
    with open_dict(config):
        config.precision = "fp16"
    with pytest.raises(GuardError, match="goes into the defaults list: - precision: fp16"):
        driver.check_before_start(config)


def test_without_the_group_nothing_is_checked_nor_changed():
    config = composed("actor_rollout_ref.model.external_lib=mine", resolve=False)
    before = OmegaConf.to_yaml(config)
    driver.check_before_start(config)
    assert OmegaConf.to_yaml(config) == before


@pytest.mark.parametrize("release", RELEASES[:-1])
def test_all_of_the_above_on_an_older_verl(release):
    """The tests of this file that need no process of their own, with another release's configuration."""
    without = "older_verl or before_ray_starts or a_plugin_that_breaks or a_worker_without"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({without})", __file__]
    env = {**os.environ, **release_environment(release)}
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.returncode == 0, process.stdout[-3000:]


def launch(*overrides: str, **env: str) -> tuple[int, str]:
    """verl's own launcher up to the point where it would start Ray; exit code and output."""
    process = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *overrides],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    (
        ({"VERL_FP16_DISABLE": "1"}, "VERL_FP16_DISABLE=1 switches verl_fp16 off"),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, "verl did not load the plugin"),
        # A verl that does not look for plugins by itself, and was not told of ours.
        ({**release_environment("0.8.0"), "VERL_USE_EXTERNAL_MODULES": ""}, "set VERL_USE_EXTERNAL_MODULES="),
    ),
    ids=("switched off", "not loaded", "not named"),
)
def test_the_flag_without_the_hooks_is_an_error_before_ray_starts(env, message, tmp_path):
    """verl swallows what a plugin raises; the flag must not run without it all the same."""
    code, output = launch("+precision=fp16", f"hydra.run.dir={tmp_path}", **env)
    assert code == 1
    assert message in output
    assert "Traceback" not in output
    assert "Started a local Ray instance" not in output


def test_every_contradiction_is_told_at_once_and_nothing_is_started(tmp_path):
    """Of verl's own launcher: one message, exit code 1, no traceback, no process left, in seconds."""
    before, used = set(psutil.pids()), resource.getrusage(resource.RUSAGE_CHILDREN)
    code, output = launch(
        "+precision=fp16",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        "actor_rollout_ref.actor.fsdp_config.dtype=banana",
        "critic.strategy=veomni",
        "verl_fp16.loss_scale.growth_factor=1",
        "+verl_fp16.los_scale=3",
        "actor_rollout_ref.rollout.top_p=0.9",
        f"hydra.run.dir={tmp_path}",
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 1
    assert "5 settings contradict the precision flag (training float16, rollout float16). Nothing was started" in output
    for key in ("rollout.dtype=bfloat16", "dtype=banana", "critic.strategy=veomni", "growth_factor=1", "los_scale=3"):
        assert key in output
    assert "Traceback" not in output and "Started a local Ray instance" not in output
    new = [process for process in psutil.process_iter() if process.pid not in before]
    assert [process for process in new if str(tmp_path) in " ".join(_command(process))] == []
    # Seconds of processor time; 9 on a machine that does nothing else, and more where its cores are shared.
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 30


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_warning_lets_the_run_go_on_and_is_told_once(capsys):
    config = composed("+precision=fp16", "actor_rollout_ref.rollout.top_p=0.9", resolve=False)
    driver.check_before_start(config)
    told = capsys.readouterr().err
    assert told.count("actor_rollout_ref.rollout.top_p=0.9") == 1
    assert told.count("the run goes on") == 1


def test_wrong_settings_and_contradictions_come_out_together():
    config = composed("+precision=fp16", "verl_fp16.train_dtype=fp17", "critic.strategy=veomni", resolve=False)
    keys = [finding.key for finding in driver.examine(config)]
    # Of verl 0.8 there is a warning besides.
    assert keys[:2] == ["verl_fp16.train_dtype", "critic.strategy"], "roles are not held against a dtype that is none"
    assert set(keys[2:]) <= {"verl"}


def test_an_interpolation_that_leads_nowhere_is_an_error_of_its_own():
    config = composed("+precision=fp16", "critic.strategy=${nowhere}", resolve=False)
    found = driver.examine(config)
    assert [finding.key for finding in found if finding.severity == "error"] == ["critic.strategy"]


@pytest.mark.parametrize("dtype", ("float16", "fp16"))
def test_without_the_flag_the_dead_key_is_told_of_in_one_line(dtype, capsys):
    key = "actor_rollout_ref.actor.fsdp_config.dtype"
    config = composed(f"{key}={dtype}", resolve=False)
    before = OmegaConf.to_yaml(config)
    driver.check_before_start(config)
    told = capsys.readouterr().err
    assert f"{key}={dtype} is not read by verl {driver.installed_verl()}" in told and "+precision=fp16" in told
    assert told.count("\n") == 1
    assert OmegaConf.to_yaml(config) == before
    driver.check_before_start(composed(resolve=False))
    assert capsys.readouterr().err == "", "verl's default is not told of"


def test_a_plugin_that_breaks_surfaces_where_the_flag_is_given(tmp_path):
    """A hook's module that cannot be imported: verl would swallow it at DEBUG."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['verl_fp16.hooks'] = None\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    code, output = launch("+precision=fp16", f"hydra.run.dir={tmp_path}", PYTHONPATH=path)
    assert code == 1
    assert "verl_fp16.hooks" in output
    assert "Traceback" not in output
    assert "Started a local Ray instance" not in output


def test_a_worker_without_the_hooks_stops():
    """What verl imports in every worker through model.external_lib."""
    code = (
        "from verl.utils.import_utils import import_external_libs as f; f('verl_fp16.required')\n"
        "import verl.workers.engine.fsdp.transformer_impl, verl.utils.debug.metrics, verl_fp16.hooks as h\n"
        "import verl_fp16.plugin as p; "
        "print(p.flag_given, {h.patcher.status()[name] for name in ('engine.loss_scaler', 'mismatch.measure')})"
    )

    def worker(**env):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})

    off = worker(VERL_FP16_DISABLE="1")
    assert off.returncode != 0
    assert "PluginNotActive" in off.stderr
    for env in ({}, {"VERL_USE_EXTERNAL_PLUGINS": "none"}):
        process = worker(**env)
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip() == "True {'applied'}", (
            "where verl did not load the plugin, the import does it in time"
        )
