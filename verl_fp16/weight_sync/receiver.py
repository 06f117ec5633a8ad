"""The receiving side of an audited weight sync, in every vLLM worker. Torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from verl_fp16.weight_sync.digest import stream_digest
from verl_fp16.weight_sync.load_record import LoadRecord
from verl_fp16.weight_sync.sender import read_digests

Targets = Callable[[], Iterable[tuple[str, torch.Tensor]]]


class WeightReceiver:
    """Notes what arrives in one sync, before it is loaded, and what becomes of it.

    Args:
        targets: gives (name, tensor) of everything that weights are loaded into, as it is when called.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._record = LoadRecord()
        self._noted: list[tuple[str, torch.Tensor, torch.Size, torch.dtype]] = []

    def load(self, weights: Sequence[tuple[str, torch.Tensor]], load: Callable[[], Any]) -> Any:
        """Call ``load``, which loads ``weights``: (name, tensor) of a part of the stream."""
        self._noted += [(name, stream_digest(tensor), tensor.shape, tensor.dtype) for name, tensor in weights]
        with self._record.watching(weights, self._targets()):
            return load()

    def report(self, dtype: torch.dtype) -> dict[str, Any]:
        """What arrived and what is held now, in plain types; waits for the device.

        ``stream``: a list of (name, dtype, shape, digest); ``mismatches``: names that are not held as they were copied;
        ``not_loaded``: parameters that nothing was copied into; ``partly_loaded``: of the others, how many elements
        hold something that was not copied there; ``idle``: names that nothing was done with; ``gone``: targets that
        were loaded and are not there any more; ``wide``: names that must not come in ``dtype``, each with the reason;
        ``exempt``: those of them that are held in other dtypes only.
        """
        targets = list(self._targets())
        parameters = [(name, tensor) for name, tensor in targets if isinstance(tensor, torch.nn.Parameter)]
        not_loaded = self._record.not_loaded(parameters)
        partly_loaded = self._record.partly_loaded(parameters)
        return {
            "stream": read_digests(self._noted),
            "mismatches": self._record.mismatches(targets),
            "not_loaded": not_loaded,
            "partly_loaded": partly_loaded,
            "idle": self._record.idle(),
            "gone": sorted(self._record.copies.keys() - {name for name, _ in targets}),
            "wide": dict(self._wide(dtype, doubt=bool(not_loaded or partly_loaded))),
            "exempt": sorted(name for name, held in self._record.dtypes.items() if dtype not in held),
        }

    def _wide(self, dtype: torch.dtype, doubt: bool) -> Iterable[tuple[str, str]]:
        """Names that have to come as they are.

        Args:
            doubt: whether some parameter came by its values in a way that was not seen. If not, a name that nothing is
                done with may come in any dtype.
        """
        for name in sorted(self._record.seen):
            others = sorted(str(d).removeprefix("torch.") for d in self._record.dtypes.get(name, ()) if d != dtype)
            if others:
                yield name, f"held in {', '.join(others)}"
            elif name in self._record.altered:
                yield name, "not merely copied"
            elif name not in self._record.dtypes and (doubt or name in self._record.used):
                yield name, "where it went could not be followed"
