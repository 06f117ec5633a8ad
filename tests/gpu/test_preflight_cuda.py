"""preflight's passes on a GPU against those on the CPU."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("kind", ("tiny_model", "tiny_moe_model"))
def test_a_gpu_shows_what_the_cpu_does(kind, request):
    from verl_fp16.preflight.run import Options, prepare, run
    from verl_fp16.preflight.shards import open_model

    folder = request.getfixturevalue(kind)
    found = {}
    for device in ("cpu", "cuda"):
        prepared = prepare(open_model(folder), Options(device=device))
        found[device], _ = run(prepared, lambda work: None)
    assert found["cuda"].loss_scale.exponent == pytest.approx(found["cpu"].loss_scale.exponent, abs=1)
    assert found["cuda"].outputs.keys() == found["cpu"].outputs.keys()
    for name, tally in found["cpu"].outputs.items():
        assert found["cuda"].outputs[name].largest == pytest.approx(tally.largest, rel=0.02), name
    for name, largest in found["cpu"].largest_outputs.items():
        assert found["cuda"].largest_outputs[name] == pytest.approx(largest, rel=0.05), name
    assert torch.cuda.memory_allocated() < 64 * 2**20
