"""Which operations run in float32 and which in float16 under autocast: torch's lists for CUDA, the CPU room's, and what
verl's engine computes in."""

from __future__ import annotations

import pytest
import torch
from gpu_ranks import needs, on_devices
from torch.nn import functional

HALF, FULL = torch.float16, torch.float32

# Operation on two float16 matrices of 64 x 64 -> the dtype that it gives under CUDA autocast.
OPERATIONS = {
    "softmax": (lambda a, b: functional.softmax(a, -1), FULL),
    "log_softmax": (lambda a, b: functional.log_softmax(a, -1), FULL),
    "logsumexp": (lambda a, b: torch.logsumexp(a, -1), FULL),
    "cross_entropy": (lambda a, b: functional.cross_entropy(a, torch.arange(64, device=a.device)), FULL),
    "layer_norm": (lambda a, b: functional.layer_norm(a, (64,)), FULL),
    "matmul": (lambda a, b: a @ b, HALF),
    "linear": (lambda a, b: functional.linear(a, b), HALF),
    "bmm": (lambda a, b: torch.bmm(a[None], b[None]), HALF),
    "attention": (
        lambda a, b: functional.scaled_dot_product_attention(a[None, None], b[None, None], b[None, None]),
        HALF,
    ),
    "of float32": (lambda a, b: a.float() @ b.float(), HALF),
}
# What CPU autocast leaves in float16 with the CPU room too. No model that verl trains here has one: their norms cast to
# float32 themselves.
ON_A_CPU = {"layer_norm": HALF}


def dtypes_under_autocast(device: str) -> dict[str, torch.dtype]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).to(device, HALF) for _ in range(2))
    with torch.autocast(device, dtype=HALF):
        return {name: operation(a, b).dtype for name, (operation, _) in OPERATIONS.items()}


def test_cuda_autocast_has_these_lists():
    assert dtypes_under_autocast("cuda") == {name: dtype for name, (_, dtype) in OPERATIONS.items()}


def test_the_cpu_room_has_the_same_but_for_layer_norm(device):
    from verl_fp16.cpu.autocast import softmax_in_float32

    with softmax_in_float32():
        found = dtypes_under_autocast("cpu")
    assert found == {name: dtype for name, (_, dtype) in OPERATIONS.items()} | ON_A_CPU


@pytest.mark.parametrize("name", ("softmax", "log_softmax", "logsumexp"))
def test_what_is_float32_was_not_rounded_to_float16_before(device, name):
    from verl_fp16.cpu.autocast import softmax_in_float32

    operation, _ = OPERATIONS[name]
    logits = (10 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).to(device, HALF)
    with softmax_in_float32(), torch.autocast(device, dtype=HALF):
        found = operation(logits, None)
    exact = operation(logits.double(), None)
    assert (found.double() - exact).abs().max() < 1e-5 * max(1.0, exact.abs().max().item())
    assert not torch.equal(found, found.half().float()), "it has more digits than float16"


class _Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes, by name, in which dtypes operations take and give what."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, set[torch.dtype]] = {}
        self.taken: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        first = result[0] if isinstance(result, tuple | list) else result
        for tensor, noted in ((first, self.given), (args[0] if args else None, self.taken)):
            if isinstance(tensor, torch.Tensor):
                noted.setdefault(name, set()).add(tensor.dtype)
        return result


def dtypes_in_verls_engine(model: str) -> dict:
    """Of a forward and backward pass with log-probabilities and entropy."""
    from engines import make_engine, mine
    from verl.utils import tensordict_utils as tu

    from verl_fp16 import standalone

    engine = make_engine(model, "fsdp2")
    batch = standalone.make_batch(mine())
    tu.assign_non_tensor(batch, calculate_entropy=True, return_model_output=True)
    seen = {}

    def loss(model_output, data, dp_group=None):
        seen.update({name: model_output[name].values().dtype for name in ("log_probs", "entropy")})
        return standalone.next_token_loss(model_output, data, dp_group)

    with engine.train_mode(), _Dtypes() as noted:
        engine.forward_backward_batch(batch, loss, forward_only=False)
        gradients = {parameter.grad.dtype for parameter in engine.module.parameters()}
    return {"given": noted.given, "taken": noted.taken, "outputs": seen, "gradients": gradients}


@needs("verl", "transformers")
def test_verls_engine_multiplies_in_float16_and_normalises_in_float32(tiny_model, device, tmp_path):
    (seen,) = on_devices(1, dtypes_in_verls_engine, str(tiny_model), folder=tmp_path, device=device)
    assert seen["outputs"] == {"log_probs": FULL, "entropy": FULL}
    assert seen["taken"]["mm"] == {HALF}, "every linear layer, forward and backward"
    # flash-attn has a kernel of its own for log-probabilities, which is not seen here.
    normalisations = {"_softmax", "_log_softmax", "logsumexp"} & seen["given"].keys()
    assert normalisations, "the entropy takes a softmax at least"
    assert {name: seen["given"][name] for name in normalisations} == dict.fromkeys(normalisations, {FULL})
    attentions = [name for name in seen["taken"] if name.startswith("_scaled_dot_product")]
    assert all(seen["taken"][name] == {HALF} for name in attentions)
    assert seen["gradients"] == {FULL}
