"""Hooks on the process that reads the configuration, before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from verl_fp16 import plugin
from verl_fp16.settings import Settings, SettingsError

NODE = "verl_fp16"
GROUP = "precision"
TRIPWIRE = "verl_fp16.required"

# Role -> its engine's configuration, in verl 0.9.1.
ENGINES = {
    "actor": "actor_rollout_ref.actor.fsdp_config",
    "ref": "actor_rollout_ref.ref.fsdp_config",
    "critic": "critic.fsdp",
}
MODELS = ("actor_rollout_ref.model", "critic.model")


def check_before_start(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """``auto_set_device`` is the first thing that each of verl's entry points does with its configuration."""

    def auto_set_device(config: Any) -> None:
        original(config)
        if is_flag_given(config):
            plugin.require_active()
            read_settings(config)
            check_roles(config)
            keep_tripwire(config)
        else:
            refuse_mistyped_flag(config)

    return auto_set_device


def is_flag_given(config: Any) -> bool:
    """Whether one of the groups ``precision=...`` is in the configuration."""
    return isinstance(config, DictConfig) and config.get(NODE) is not None


def refuse_mistyped_flag(config: Any) -> None:
    """A flag with a slip in its name is a new key of nobody's to Hydra, and the run would be in BF16 without a word.

    Raises:
        SettingsError: naming the key and the flag.
    """
    if not isinstance(config, DictConfig):
        return
    # Any other key is the user's own: what is refused has nearly the group's name, and one of its members as value.
    members = [path.stem for path in (Path(plugin.__file__).parent / "conf" / GROUP).glob("*.yaml")]
    for key, value in OmegaConf.to_container(config, resolve=False).items():
        if value in members and key != GROUP and get_close_matches(str(key), [GROUP], cutoff=0.8):
            raise SettingsError(f"unknown key {key}={value}: did you mean +{GROUP}={value}?")


def read_settings(config: DictConfig) -> Settings:
    """The validated node ``verl_fp16:``.

    Raises:
        SettingsError: an unknown key or an invalid value, by name.
    """
    node = config[NODE]
    if not isinstance(node, DictConfig):
        raise SettingsError(f"verl_fp16 must be a mapping, got {node!r}")
    unresolved = OmegaConf.to_container(node, resolve=False)
    for name in ("loss_scale", "critic_loss_scale"):
        # Checked before interpolations (strings here) are resolved, which would fail with another key's name.
        if not isinstance(unresolved.get(name, {}), dict | str):
            raise SettingsError(f"verl_fp16.{name} must be a mapping, got {unresolved[name]!r}")
    return Settings.from_node(OmegaConf.to_container(node, resolve=True, throw_on_missing=True))


def check_roles(config: DictConfig) -> None:
    """See that what the workers need still reaches every role.

    Raises:
        SettingsError: another entry point than PPO's, or a role that an override has cut off from the flag.
    """
    if OmegaConf.select(config, "actor_rollout_ref.actor._target_") is None:
        raise SettingsError(
            "the groups precision=... are for verl's PPO entry points (main_ppo and others); this configuration has no "
            "actor, so nothing would read them. Drop the group here."
        )
    for role, key in ENGINES.items():
        if OmegaConf.select(config, key) is None:
            continue
        mixed_precision = OmegaConf.select(config, f"{key}.mixed_precision")
        if mixed_precision is None or mixed_precision.get(NODE) is None:
            raise SettingsError(
                f"{key}.mixed_precision{'' if mixed_precision is None else '.' + NODE} was removed by an override: the "
                f"{role} would train without this package's loss scaler or in another dtype. Drop that override; to "
                "choose other dtypes use another precision=..., or override single keys of mixed_precision."
            )
        model_dtype = OmegaConf.select(config, f"{key}.model_dtype")
        if model_dtype not in ("fp32", "float32"):
            raise SettingsError(
                f"{key}.model_dtype={model_dtype} would keep the {role}'s master weights in less than float32. "
                f"Set {key}.model_dtype=fp32."
            )


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


def role_settings(role: str, *, _root_: DictConfig) -> DictConfig:
    """The answer to ``${verl_fp16:<role>}``: what rides to the workers of ``role`` in its ``mixed_precision``.

    Raises:
        PluginNotActive: the hooks are not in place in this process.
        SettingsError: as :func:`read_settings`.
    """
    plugin.require_active()
    plugin.flag_given = True
    return settings_for_role(role, _root_)


def settings_for_role(role: str, config: DictConfig) -> DictConfig:
    """What the configuration says for ``role``, whatever this process is.

    Raises:
        SettingsError: as :func:`read_settings`, or an unknown role.
    """
    settings = read_settings(config)
    scales = {"actor": settings.loss_scale, "critic": settings.critic_loss_scale, "ref": None}
    if role not in scales:
        raise SettingsError(f"${{verl_fp16:{role}}}: unknown role, known are {', '.join(scales)}")
    scale = scales[role]
    values = {"role": role, "dtype": settings.train_dtype, "loss_scale": vars(scale) if scale is not None else None}
    return OmegaConf.create(values)  # OmegaConf.resolve, which verl's task runner calls, takes no plain dict


def register_resolver() -> None:
    """Make ``${verl_fp16:<role>}`` resolve in this process."""
    OmegaConf.register_new_resolver(NODE, role_settings, replace=True)
