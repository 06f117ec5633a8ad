"""Hooks on the process that reads the configuration, before Ray starts."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_fp16 import guard, plugin
from verl_fp16.findings import Finding, errors, render_errors, render_warnings
from verl_fp16.groups import GROUPS, members
from verl_fp16.guard.algorithm import BYPASS
from verl_fp16.guard.case import FSDP_SPELLINGS, MODELS, NODE, ROLES, dtype_of
from verl_fp16.guard.roles import FOLDER, payload
from verl_fp16.local_inputs import missing_gpus, missing_inputs
from verl_fp16.mistyped import GROUP, mistyped_flag, mistyped_group
from verl_fp16.refusal import GuardError, in_launcher, one_message
from verl_fp16.settings import Settings, SettingsError

TRIPWIRE = "verl_fp16.required"
LAUNCHER = "verl_fp16_processes"

# The parts of verl's configuration that the guard looks at: one that cannot be resolved cannot be vouched for.
JUDGED = ("actor_rollout_ref", "critic", "algorithm", "trainer", "distillation", "model_engine")


def check_before_start(config: Any) -> None:
    """Refuse what cannot do what the flag declares; without the flag, say what only looks like it.

    Raises:
        Refused: in verl's launcher, with one message.
        GuardError, PluginNotActive: elsewhere.
    """
    with one_message(GuardError, plugin.PluginNotActive):
        if is_flag_given(config):
            plugin.require_active(verify=True)
            refuse_several_members(config)
            refuse_runs_in_one_process()
            refuse_mistyped_flag(config)
            guard_start(config)
            tell_of_unknown_keys(config)
            require_inputs(config)
            keep_tripwire(config)
        else:
            refuse_mistyped_flag(config)
            tell_of_dead_dtype(config)


def is_flag_given(config: Any) -> bool:
    """Whether one of the groups ``precision=...`` is in the configuration, or what an override left of it."""
    if not isinstance(config, DictConfig):
        return False
    if config.get(NODE) is not None:
        return True
    mixed = (OmegaConf.select(config, f"{role.engine}.mixed_precision") for role in ROLES)
    return any(isinstance(node, DictConfig) and NODE in node for node in mixed)


def guard_start(config: DictConfig) -> None:
    """Print the warnings on a configuration with the flag, and refuse it if there are errors.

    Raises:
        GuardError: listing every contradiction.
    """
    found = examine(config)
    if errors(found):
        raise GuardError(render_errors(found, declared_pair(config)))
    if found:
        print(render_warnings(found), file=sys.stderr, flush=True)


def tell_of_unknown_keys(config: DictConfig) -> None:
    """In verl's launcher, warn of keys that verl's own configuration lacks: Hydra takes them, and nobody reads them.

    Nothing is said of an entry point that builds on another configuration of verl's.
    """
    # Imported in the launcher alone, where Hydra is there: every process that loads the hooks imports this module.
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from verl_fp16.config_difference import PLAIN, plain_configuration
    from verl_fp16.installed import find_verl
    from verl_fp16.unknown_keys import unknown_keys

    if not in_launcher() or not GlobalHydra.instance().is_initialized():
        return
    hydra, loader = HydraConfig.get(), GlobalHydra.instance().config_loader()
    # As they were written, with those of Hydra's own: the search path may be among them.
    given = OmegaConf.to_container(hydra.overrides, resolve=False)
    overrides = [*given["hydra"], *given["task"]]
    loaded = loader.compute_defaults_list(hydra.job.config_name, overrides, RunMode.RUN)
    if PLAIN not in {one.config_path for one in loaded.defaults}:
        return
    verl = find_verl()
    ours, theirs = OmegaConf.to_container(config, resolve=False), plain_configuration(verl.config_dir)
    if found := unknown_keys(ours, theirs, verl.folder):
        print(render_warnings(found), file=sys.stderr, flush=True)


def require_inputs(config: DictConfig) -> None:
    """In verl's launcher, refuse a start whose data, model or GPUs are not there: verl says so from behind Ray's start.

    Raises:
        GuardError: naming each.
    """
    if not in_launcher():
        return
    container, _ = resolved(config)
    if missing := [*missing_inputs(container, os.environ), *missing_gpus(container, os.environ)]:
        raise GuardError("\n".join(["verl_fp16: what the run needs is not there. Nothing was started.", *missing]))


def declared_pair(config: DictConfig) -> str:
    """What the flag declares, in words; empty where an override has taken it away."""
    node = config.get(NODE)
    if not isinstance(node, DictConfig):
        return ""
    pair = OmegaConf.to_container(node, resolve=False)
    return f"training {pair.get('train_dtype')}, rollout {pair.get('rollout_dtype')}"


def examine(config: DictConfig) -> list[Finding]:
    """Everything that is wrong with a configuration with the flag."""
    settings, found = read_node(config)
    if config.get(NODE) is None:
        return found  # nothing is declared that the rest could be held against
    container, unresolved = resolved(config, placeholders=settings is None)
    if "actor_rollout_ref" in config and "actor_rollout_ref" not in container:
        return [*found, *unresolved]
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    return [
        *found,
        *unresolved,
        *guard.check(container, settings, verl=installed_verl(), entry=main.name if main is not None else ""),
    ]


def installed_verl() -> str:
    """The release of the verl that is imported here, or would be."""
    from verl_fp16.hooks import VERL

    return VERL.installed()


def read_node(config: DictConfig) -> tuple[Settings | None, list[Finding]]:
    """The settings under ``verl_fp16:``, or None and what is wrong with them."""
    node = config.get(NODE)
    if node is None:
        why = "an override removed the node that all roles take their dtypes from"
        return None, [Finding("error", NODE, node, why, advice="drop the override, or the whole group precision=...")]
    try:
        return read_settings(config), []
    except SettingsError as error:
        return None, list(error.findings)
    except OmegaConfBaseException as error:
        return None, [_unresolved(NODE, error)]


def read_settings(config: DictConfig) -> Settings:
    """The validated node ``verl_fp16:``.

    Raises:
        SettingsError: listing every unknown key and every invalid value.
    """
    node = config[NODE]
    if isinstance(node, DictConfig):
        unresolved = OmegaConf.to_container(node, resolve=False)
        # Of a scale that is no mapping, the interpolations (strings here) to its keys could not be resolved.
        broken = {key: value for key, value in unresolved.items() if key.endswith("loss_scale")}
        if not any(not isinstance(value, dict | str) for value in broken.values()):
            return Settings.from_node(OmegaConf.to_container(node, resolve=True, throw_on_missing=True))
        node = {**unresolved, **{key: {} for key, value in broken.items() if isinstance(value, dict)}}
    return Settings.from_node(node)


def resolved(config: DictConfig, placeholders: bool = False) -> tuple[dict[str, Any], list[Finding]]:
    """The configuration as plain containers, and what of it cannot be resolved.

    Args:
        placeholders: put empty mappings where roles carry our settings, which are wrong.
    """
    if placeholders:
        config = copy.deepcopy(config)
        for role in ROLES:
            mixed = OmegaConf.select(config, f"{role.engine}.mixed_precision")
            if isinstance(mixed, DictConfig) and mixed._get_node(NODE) is not None:
                with open_dict(mixed):
                    mixed[NODE] = {"role": role.name}
    container: dict[str, Any] = {}
    unresolved = []
    for key in config:
        try:
            node = config._get_node(key)
            is_node = isinstance(node, DictConfig | ListConfig) and not node._is_none()
            container[key] = OmegaConf.to_container(node, resolve=True) if is_node else config[key]
        except OmegaConfBaseException as error:
            if key in JUDGED:
                unresolved.append(_unresolved(str(key), error))
    return container, unresolved


def _unresolved(key: str, error: OmegaConfBaseException) -> Finding:
    where = str(getattr(error, "full_key", None) or key)
    why = " ".join(str(error).split())
    return Finding("error", where, "(cannot be resolved)", why, advice="correct the interpolation, or set the key")


def refuse_mistyped_flag(config: Any) -> None:
    """A flag with a slip in its name is a new key of nobody's to Hydra, and the run would be in BF16 without a word.

    So is, beside a flag that is given, another one with a slip or one of the recipes' groups.

    Raises:
        GuardError: naming the key and the flag, or the group.
    """
    if not isinstance(config, DictConfig):
        return
    container = OmegaConf.to_container(config, resolve=False)
    if is_flag_given(config):
        slip = mistyped_group(container, {group: members(group) for group in GROUPS})
        key, value, group, member = slip or (None,) * 4
        plus = ""
    else:
        slip = mistyped_flag(container, members(GROUP))
        key, value, member = slip or (None,) * 3
        group, plus = GROUP, "+"
    if slip:
        hint = f" In a recipe it goes into the defaults list: - {group}: {member}" if key == group else ""
        if not plus and group != GROUP:
            hint += f" Where no recipe names the group: +{group}={member}."
        raise GuardError(f"verl_fp16: unknown key {key}={value}: did you mean {plus}{group}={member}?{hint}")


def refuse_several_members(config: DictConfig) -> None:
    """``+precision=[fp16,bf16]`` is legal in Hydra, and the last one would win without a word.

    Raises:
        GuardError: naming them.
    """
    from hydra.core.hydra_config import HydraConfig  # Hydra's part of it is slow to import

    choice = HydraConfig.get().runtime.choices.get(GROUP) if HydraConfig.initialized() else None
    if isinstance(choice, list | ListConfig):
        raise GuardError(f"verl_fp16: {GROUP}={list(choice)} declares several precisions: name one of them")


def refuse_runs_in_one_process() -> None:
    """With Hydra's basic launcher a sweep's second run would start on what the first left of Ray and of our hooks.

    It is still Hydra's default where the flag itself is swept (``+precision=fp16,bf16``): our launcher comes with the
    flag, and the sweep as a whole has none. A run of our launcher is no sweep of its own.

    Raises:
        GuardError: naming the launcher that gives each run a process.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    launcher = HydraConfig.get().runtime.choices.get("hydra/launcher")
    if launcher in ("basic", LAUNCHER):
        raise GuardError(
            "verl_fp16: the runs of this sweep would share one process, and verl and Ray are not made for a second "
            f"run in it: add hydra/launcher={LAUNCHER}, which gives each a process of its own"
        )


def tell_of_dead_dtype(config: Any) -> None:
    """Without the flag: one line on stderr for verl's documented FP16 key, which verl does not read."""
    keys = list(_float16_keys(config)) if isinstance(config, DictConfig) else []
    if keys and not _patched_to_read_it():
        print(
            f"verl_fp16: {', '.join(keys)} is not read by verl {installed_verl()}: training stays in bfloat16. "
            f"+{GROUP}=fp16 is the flag for FP16.",
            file=sys.stderr,
            flush=True,
        )


def _patched_to_read_it() -> bool:
    """Whether the installed verl carries our source patch, with which the key is read."""
    from verl_fp16.hooks import HOOKS
    from verl_fp16.patching.static import SourceTree, patched_in_source

    engine = next(hook.target for hook in HOOKS if hook.name == "engine.loss_scaler")
    function = SourceTree.of_package("verl").function(engine)
    return function is not None and patched_in_source(function)


def _float16_keys(config: DictConfig) -> Iterator[str]:
    for role in ROLES:
        key = f"{role.engine}.dtype"
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException:  # not our run: verl tells what is wrong with it
            continue
        if value == "half" or dtype_of(value, FSDP_SPELLINGS) == "float16":
            yield f"{key}={value}"


def keep_tripwire(config: DictConfig) -> None:
    """Add :mod:`verl_fp16.required` to the modules that verl imports in every worker, whatever the user put there."""
    for key in MODELS:
        model = OmegaConf.select(config, key)
        if model is None:
            continue
        theirs = model.get("external_lib")
        modules = list(theirs) if isinstance(theirs, ListConfig | list | tuple) else [theirs] if theirs else []
        if TRIPWIRE not in modules:
            with open_dict(model):
                model.external_lib = [*modules, TRIPWIRE]


def role_settings(role: str, *, _root_: DictConfig) -> DictConfig | str:
    """The answer to ``${verl_fp16:<role>}``: what rides to the workers of ``role`` in its ``mixed_precision``.

    For the role ``driver``, which Hydra asks for before it calls verl's launcher, it is just a word.

    Raises:
        PluginNotActive: the hooks are not in place in this process.
        SettingsError: as :func:`read_settings`.
        Refused: instead of either, in verl's launcher.
    """
    with one_message(plugin.PluginNotActive, SettingsError):
        plugin.require_active()
        plugin.flag_given = True
        return "given" if role == "driver" else settings_for_role(role, _root_)


def settings_for_role(role: str, config: DictConfig) -> DictConfig:
    """What the configuration says for ``role``, whatever this process is.

    Raises:
        SettingsError: as :func:`read_settings`, or an unknown role.
    """
    settings = read_settings(config)
    known = [known.name for known in ROLES]
    if role not in known:
        raise SettingsError(f"${{verl_fp16:{role}}}: unknown role, known are {', '.join(known)}")
    folder, bypass = OmegaConf.select(config, FOLDER), OmegaConf.select(config, BYPASS)
    return OmegaConf.create(payload(role, settings, folder, bypass is True))  # OmegaConf.resolve takes no plain dict
