"""vLLM's CPU experts are packed after every load; the real ones are run by the recipe cpu_moe."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from verl_fp16.cpu.wrappers import pack_experts_again


class Experts:
    """As vLLM's ``CPUUnquantizedExperts``: packs what the layer holds."""

    def __init__(self, width: int = 64, multiple: int = 32) -> None:
        self.moe_config = SimpleNamespace(intermediate_size_per_partition=width)
        self._multiple = multiple

    def _intermediate_alignment(self) -> int:
        return self._multiple

    def _padded_intermediate_size(self, config) -> int:
        return -(-config.intermediate_size_per_partition // self._multiple) * self._multiple

    def process_weights_after_loading(self, layer) -> None:
        layer.weight = ("packed", layer.weight)


def method(backend: str, experts: Experts):
    """As vLLM's ``UnquantizedFusedMoEMethod``, with the part of ``_setup_kernel`` that matters."""

    def setup(self, layer, w13, w2):
        if self.moe_kernel is None:
            self.moe_kernel = SimpleNamespace(fused_experts=experts)
            if backend == "CPU":
                experts.process_weights_after_loading(layer)

    made = SimpleNamespace(moe_kernel=None, unquantized_backend=SimpleNamespace(name=backend))
    return made, setup


@pytest.mark.parametrize(("wrapped", "after_sync"), ((False, "new"), (True, ("packed", "new"))))
def test_new_weights_are_packed_where_vllm_leaves_them(wrapped, after_sync):
    made, setup = method("CPU", Experts())
    setup = pack_experts_again(setup) if wrapped else setup
    layer = SimpleNamespace(weight="first")
    setup(made, layer, None, None)
    assert layer.weight == ("packed", "first"), "once, not twice"
    layer.weight = "new"
    setup(made, layer, None, None)
    assert layer.weight == after_sync


def test_other_backends_are_left_alone():
    made, setup = method("TRITON", Experts())
    setup, layer = pack_experts_again(setup), SimpleNamespace(weight="first")
    for _ in range(2):
        setup(made, layer, None, None)
    assert layer.weight == "first"


def test_padded_experts_take_no_new_weights():
    made, setup = method("CPU", Experts(width=48))
    setup, layer = pack_experts_again(setup), SimpleNamespace(weight="first")
    setup(made, layer, None, None)
    with pytest.raises(RuntimeError, match="pads experts of width 48 to 64 .* a multiple of 32"):
        setup(made, layer, None, None)
