"""Names of parameters and modules as the model itself has them, whatever wraps the model. Pure torch."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

# The attribute under which FSDP1, activation checkpointing and torch.compile keep the module that they wrap.
_WRAPPED = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})


def name_in_model(name: str) -> str:
    """``name`` of a parameter or module without the parts that wrappers added; "" is the model itself."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` only wraps another one, of which it has the name."""
    return not _WRAPPED.isdisjoint(module._modules)


def class_in_model(module: nn.Module) -> str:
    """The name of the class of ``module`` before FSDP2 put its own class in front of it."""
    return next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule)).__name__
