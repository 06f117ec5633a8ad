"""Records of skipped updates: one line for the log, one JSON line in the run's folder. Plain Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl_fp16.loss_scale_settings import FORWARD, GRADIENT, NORM
from verl_fp16.telling import tell

if TYPE_CHECKING:
    from verl_fp16.attribution import NonFiniteGradient
    from verl_fp16.module_trace import NonFiniteOutput

# In the record, and in the line for the log.
MAX_RECORDED, MAX_IN_LINE = 20, 3


@dataclass(frozen=True)
class RankFindings:
    """What one rank knows of an update that is skipped.

    Args:
        rank: the rank.
        gradients: the non-finite gradients in the shards that it holds, worst first.
        forward_fault: whether its own data gave a loss or an output that is not finite.
        traced: whether it looked for the first module whose output is not finite.
        module: that module, if there is one.
    """

    rank: int
    gradients: tuple[NonFiniteGradient, ...] = ()
    forward_fault: bool = False
    traced: bool = False
    module: NonFiniteOutput | None = None


@dataclass(frozen=True)
class SkipRecord:
    """One skipped update.

    Args:
        time: UTC, ISO 8601.
        role: actor or critic.
        update: the update (mini-batch), counted from 1 over resumed runs.
        kind: ``gradient``: they overflowed under the scale; ``forward``: the loss or an output of the forward pass was
            not finite; ``norm``: the norm of finite gradients was not.
        scale: the loss scale that it was made with.
        scale_after: the one of the next update.
        consecutive: updates skipped in a row, with this one.
        gradients: the parameters with non-finite gradients, worst first, at most 20: ``parameter``, ``infinite``,
            ``nan``, ``elements`` (of the shard), ``rank`` (which holds the shard).
        gradients_total: how many there are, a parameter counted once for each rank with a part of it.
        data_ranks: the ranks whose data it came from; None where that cannot be known: gradients are summed over the
            ranks before anybody looks at them.
        traced: whether the first module whose output is not finite was looked for.
        modules: rank -> that module, where there is one.
    """

    time: str
    role: str
    update: int
    kind: str
    scale: float
    scale_after: float
    consecutive: int
    gradients: tuple[dict[str, Any], ...]
    gradients_total: int
    data_ranks: tuple[int, ...] | None
    traced: bool
    modules: dict[str, dict[str, Any]]

    @classmethod
    def of_ranks(cls, ranks: Sequence[RankFindings], *, kind: str, **known: Any) -> SkipRecord:
        """Put together what the ranks found; ``known`` are the fields that all of them know."""
        gradients = [{**asdict(gradient), "rank": rank.rank} for rank in ranks for gradient in rank.gradients]
        gradients.sort(key=lambda gradient: -(gradient["infinite"] + gradient["nan"]))
        faulty_ranks = tuple(rank.rank for rank in ranks if rank.forward_fault)
        return cls(
            time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            kind=kind,
            gradients=tuple(gradients[:MAX_RECORDED]),
            gradients_total=len(gradients),
            data_ranks=faulty_ranks if kind == FORWARD else (ranks[0].rank,) if len(ranks) == 1 else None,
            traced=any(rank.traced for rank in ranks),
            modules={str(rank.rank): asdict(rank.module) for rank in ranks if rank.module is not None},
            **known,
        )

    def line(self) -> str:
        """The record in one line."""
        stays = self.scale_after == self.scale
        scale = f"loss scale stays {self.scale:g}" if stays else f"loss scale {self.scale:g}, now {self.scale_after:g}"
        row = f"; skip {self.consecutive} in a row" if self.consecutive > 1 else ""
        return f"{self.role} update {self.update} skipped ({scale}{row}): {self.cause()}"

    def cause(self) -> str:
        """What went wrong and where, in words."""
        if self.kind == NORM:
            return "the gradients are finite, their norm is not"
        if self.kind == GRADIENT:
            return f"the gradients overflowed: {self._worst()}"
        on = f"on rank {', '.join(map(str, self.data_ranks or ()))}"
        if not self.modules:
            where = ", although every module's output was: it begins outside of them" if self.traced else ""
            output = "value" if self.role == "critic" else "log-probability"
            return f"the loss or a {output} was not finite {on}{where}; no loss scale cures that"
        said = [
            f"{module['module']} ({module['kind']}) on rank {rank}: {_counts(module)}, largest input "
            f"{module['largest_input']:.3g}"
            + (" (and inputs not finite: look before it, in its parent)" if module["non_finite_inputs"] else "")
            for rank, module in list(self.modules.items())[:MAX_IN_LINE]
        ]
        return f"the forward pass was not finite {on}, first in {'; '.join(said)}"

    def _worst(self) -> str:
        said = [
            f"{entry['parameter']} on rank {entry['rank']}: {_counts(entry)}" for entry in self.gradients[:MAX_IN_LINE]
        ]
        more = self.gradients_total - len(said)
        return "; ".join(said) + (f"; and {more} more" if more > 0 else "")


def _counts(entry: dict[str, Any]) -> str:
    found = [f"{entry[kind]} {word}" for kind, word in (("infinite", "inf"), ("nan", "nan")) if entry[kind]]
    return f"{' and '.join(found)} of {entry['elements']}"


def file_of(folder: str | Path, role: str) -> Path:
    """Where the skips of ``role`` are recorded under a run's folder."""
    return Path(folder) / "verl_fp16" / f"skips-{role}.jsonl"


def append(record: SkipRecord, folder: str | Path | None) -> None:
    """Add ``record`` to the file of its role. A folder that cannot be written to is told, and ends nothing."""
    if folder is None:
        return
    if "://" in str(folder):
        tell(f"skipped updates are not recorded in a remote folder: {folder}")
        return
    path = file_of(folder, record.role)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
    except OSError as error:
        tell(f"the skipped update could not be recorded in {path}: {error}")
