"""The optimizer keeps its moments in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verl_fp16.findings import Finding
from verl_fp16.guard.case import PRECISION_WORDS, Case

# torch.optim: moments in the dtype of the parameters, which are the float32 master weights.
FULL_PRECISION = ("AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Adafactor")


def implementation(case: Case) -> Iterator[Finding]:
    """``optim.optimizer`` of the module ``optim.optimizer_impl`` (``build_optimizer``)."""
    for role in case.roles:
        if role.forward_only:
            continue
        module, name = f"{role.section}.optim.optimizer_impl", f"{role.section}.optim.optimizer"
        if case.get(module, "torch.optim") != "torch.optim":
            why = "optimizers of other packages may keep their moments in 8 bits or bfloat16, which is not checked"
            yield Finding("warning", module, case.get(module), why, (f"{module}=torch.optim",))
        elif case.get(name, "AdamW") not in FULL_PRECISION:
            why = "not among the optimizers of torch.optim that are known to keep their moments in the weights' float32"
            yield Finding("warning", name, case.get(name), why, (f"{name}=AdamW",))


def arguments(case: Case) -> Iterator[Finding]:
    """``optim.override_optimizer_config`` goes to the optimizer's constructor as it is."""
    for role in case.roles:
        if role.forward_only:
            continue
        key = f"{role.section}.optim.override_optimizer_config"
        value = case.get(key, None)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            why = "verl hands this to the optimizer as keyword arguments: it must be a mapping"
            yield Finding("error", key, value, why, (f"{key}=null",))
            continue
        for name, argument in value.items():
            if PRECISION_WORDS.search(str(name)):
                why = "an argument for another dtype of the optimizer's state: the flag declares float32"
                yield Finding("error", f"{key}.{name}", argument, why, (f"~{key}.{name}",))


RULES = (implementation, arguments)
