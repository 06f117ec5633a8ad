"""A model of any size in FP16, whose weights are in memory only while they are computed with.

The model is transformers' own, built without weights from its configuration. Then

* each linear layer and each embedding computes with pieces of its weight, read one after the other;
* every other module with parameters of its own has them read before it runs and lets them go afterwards, in the forward
  pass and in the backward pass, as FSDP does: the parameters stay the same objects, and their storage comes and goes;
* each decoder layer is computed again in the backward pass (activation checkpointing), so that what autograd keeps of
  a layer lives only while that layer is differentiated.

Numerics are those of verl's FSDP engine with the flag: parameters rounded to float16, float16 autocast, products
accumulated in float32 and rounded once, softmax in float32, buffers in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from verl_fp16.preflight.refusals import ModelError
from verl_fp16.preflight.stored_weights import StoredWeights
from verl_fp16.prompt_tokens import load_config

DTYPE = torch.float16
_CUDA_PIECE = 2**26

WeightGradient = Callable[[str, torch.Tensor], None]
"""Is told of the gradient of a parameter, by its name in the model, or of a piece of it."""


def build(folder: Path) -> nn.Module:
    """transformers' causal language model of ``folder``: parameters on the meta device, buffers in place.

    Raises:
        ModelError: there is no such model.
    """
    try:
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    except ImportError as error:
        raise ModelError(f"{error}: transformers and accelerate are needed to run a model: pip install them") from None
    file, way_out = folder / "config.json", "Judge the weights alone: --weights-only"
    try:
        config = load_config(folder)
    except ModelError as error:
        raise ModelError(f"{error}. {way_out}") from None
    named = (getattr(config, "architectures", None) or [None])[0]
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    names = {cls.__name__ for cls in (known if isinstance(known, tuple) else (known,)) if cls is not None}
    if not names or (named is not None and named not in names):
        told = f"{named} is" if named else f"the architecture {config.model_type} has"
        raise ModelError(
            f"{file}: {told} no causal language model of transformers', and nothing else is run. {way_out}"
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # noqa: BLE001  a class of transformers may raise anything on a wrong configuration
        raise ModelError(f"{file}: transformers cannot build the model ({_told(error)}). {way_out}") from None
    model.tie_weights()
    return model.eval()


def _told(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


class StreamedModel:
    """A model from :func:`build`, ready to run.

    Args:
        model: it is changed.
        weights: its parameters.
        device: where it computes.
        weight_gradient: is told of each parameter's gradient in a backward pass; gradients are not kept.
    """

    def __init__(
        self, model: nn.Module, weights: StoredWeights, device: torch.device, weight_gradient: WeightGradient
    ) -> None:
        self.module, self.device = model, device
        self._weights, self._note = weights, weight_gradient
        self._anchor = torch.zeros((), requires_grad=True, device=device)
        self._users: Counter[int] = Counter()
        self._names: dict[int, str] = {}
        for name, buffer in model.named_buffers():
            if name in weights:
                weights.read_into(name, buffer)
        for name, module in list(model.named_modules()):
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
            if type(module) is nn.Linear:
                module.forward = functools.partial(self._linear, module, name)
            elif type(module) is nn.Embedding and module.max_norm is None:
                module.forward = functools.partial(self._embedding, module, name)
        self._stream_the_others()
        for layer in decoder_layers(model):
            layer.forward = functools.partial(_checkpointed, layer.forward)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """FP16 as verl's engine has it, around forward and backward passes."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                from verl_fp16.cpu.autocast import softmax_in_float32

                stack.enter_context(softmax_in_float32())
            stack.enter_context(torch.autocast(self.device.type, dtype=DTYPE))
            yield

    def _linear(self, module: nn.Linear, name: str, x: torch.Tensor) -> torch.Tensor:
        return _StreamedLinear.apply(
            x.to(DTYPE), self._anchor, self, name, tuple(module.weight.shape), module.bias is not None
        )

    def _embedding(self, module: nn.Embedding, name: str, ids: torch.Tensor) -> torch.Tensor:
        return _StreamedEmbedding.apply(ids, self._anchor, self, name, tuple(module.weight.shape), module.padding_idx)

    def rows(self, name: str, shape: tuple[int, int]) -> Iterator[tuple[slice, torch.Tensor]]:
        """A weight's rows, piece by piece, in FP16 on the device."""
        most = {} if self.device.type == "cpu" else {"most": _CUDA_PIECE}
        for rows, piece in self._weights.rows(name, shape, DTYPE, **most):
            yield rows, piece.to(self.device)

    def bias(self, name: str, size: int) -> torch.Tensor:
        out = torch.empty(size, dtype=DTYPE)
        self._weights.read_into(name, out)
        return out.to(self.device)

    def told(self, name: str, gradient: torch.Tensor) -> None:
        self._note(name, gradient)

    def _stream_the_others(self) -> None:
        """Parameters whose module has no pieces to compute with: their storage is there while somebody uses it."""
        streamed: dict[int, nn.Parameter] = {}
        for name, module in self.module.named_modules():
            parameters = []
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if getattr(module.forward, "func", None) in (self._linear, self._embedding):
                    # Somebody who uses it past the module gets an error, and no wrong numbers.
                    module._parameters[key] = nn.Parameter(parameter.to(DTYPE), requires_grad=False)
                    continue
                if id(parameter) not in streamed:
                    full = nn.Parameter(torch.empty(parameter.shape, dtype=DTYPE, device=self.device))
                    full.untyped_storage().resize_(0)
                    streamed[id(parameter)] = full
                    full_name = f"{name}.{key}".lstrip(".")
                    self._names[id(full)] = full_name
                module._parameters[key] = streamed[id(parameter)]
                parameters.append(streamed[id(parameter)])
            if parameters:
                module.register_forward_pre_hook(lambda module, args, held=parameters: self._acquire(held))
                module.register_forward_hook(functools.partial(self._ran, parameters), always_call=True)
        self._streamed = list(streamed.values())
        for parameter in self._streamed:
            parameter.register_post_accumulate_grad_hook(self._differentiated)

    def _acquire(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            self._users[id(parameter)] += 1
            storage = parameter.untyped_storage()
            if storage.size() == 0:
                storage.resize_(parameter.numel() * parameter.element_size())
                # autograd must not take the weights that come back for others than it has saved.
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(parameter):
                    self._weights.read_into(self._names[id(parameter)], parameter.detach())

    def _release(self, parameter: nn.Parameter, users: int = 1) -> None:
        self._users[id(parameter)] -= users
        if self._users[id(parameter)] <= 0:
            self._users[id(parameter)] = 0
            parameter.untyped_storage().resize_(0)

    def _ran(self, parameters: list[nn.Parameter], module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._acquire(parameters))
        for parameter in parameters:
            self._release(parameter)

    def let_go(self) -> None:
        """Forget weights that a backward pass has read and not used up."""
        for parameter in self._streamed:
            self._users[id(parameter)] = 0
            parameter.untyped_storage().resize_(0)

    def _differentiated(self, parameter: torch.Tensor) -> None:
        """All of the gradient is there, so no use of the parameter in this backward pass is left."""
        self._note(self._names[id(parameter)], parameter.grad)
        parameter.grad = None
        self._release(parameter, self._users[id(parameter)])


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules in the outermost lists of modules."""
    found: list[nn.Module] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in inside):
            inside.append(name)
            found.extend(module)
    return found


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not args and "hidden_states" in kwargs:
        args = (kwargs.pop("hidden_states"),)
    # Reentrant: the layer's own graph is built, used and dropped within the backward pass.
    call = functools.partial(forward, **kwargs)
    return checkpoint(call, *args, use_reentrant=True, preserve_rng_state=False)


class _StreamedLinear(torch.autograd.Function):
    """``x @ weight.T + bias`` with pieces of the weight's rows; accumulated in float32, rounded to FP16 once.

    On a CPU the factors are widened to float32, in which a product of two FP16 numbers is exact: torch's own FP16
    products there take up to a hundred times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, model: StreamedModel, name: str, shape: tuple, bias: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.model, ctx.name, ctx.shape, ctx.bias = model, name, shape, bias
        wide = _widened(x)
        out = x.new_empty(*x.shape[:-1], shape[0])
        with torch.autocast(x.device.type, enabled=False):
            added = model.bias(f"{name}.bias", shape[0]) if bias else None
            for rows, weight in model.rows(f"{name}.weight", shape):
                part = None if added is None else _widened(added[rows])
                out[..., rows] = functional.linear(wide, _widened(weight), part)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        model, name, shape = ctx.model, ctx.name, ctx.shape
        flat, inputs = gradient.reshape(-1, shape[0]), _widened(x.reshape(-1, shape[1]))
        into = torch.zeros(flat.shape[0], shape[1], dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for rows, weight in model.rows(f"{name}.weight", shape):
                part = _widened(flat[:, rows])
                into += part @ _widened(weight)
                model.told(f"{name}.weight", (part.t() @ inputs).to(DTYPE))
            if ctx.bias:
                model.told(f"{name}.bias", flat.sum(0, dtype=torch.float32).to(DTYPE))
        return into.to(x.dtype).view_as(x), None, None, None, None, None


class _StreamedEmbedding(torch.autograd.Function):
    """The rows of a weight that ``ids`` name, found piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, anchor: torch.Tensor, model: StreamedModel, name: str, shape: tuple, padding: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.model, ctx.name, ctx.shape, ctx.padding = model, name, shape, padding
        out = torch.empty(*ids.shape, shape[1], dtype=DTYPE, device=ids.device)
        for rows, weight in model.rows(f"{name}.weight", shape):
            here = (ids >= rows.start) & (ids < rows.stop)
            out[here] = weight[ids[here] - rows.start]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        (ids,) = ctx.saved_tensors
        kept = ids != ctx.padding if ctx.padding is not None else torch.ones_like(ids, dtype=torch.bool)
        # Only the rows of tokens that occur: the others have no gradient.
        _, places = ids[kept].unique(return_inverse=True)
        rows = int(places.max()) + 1 if places.numel() else 0
        found = torch.zeros(rows, ctx.shape[1], dtype=torch.float32, device=gradient.device)
        found.index_add_(0, places, gradient[kept].float())
        ctx.model.told(f"{ctx.name}.weight", found.to(DTYPE))
        return None, None, None, None, None, None


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.device.type == "cpu" else tensor
