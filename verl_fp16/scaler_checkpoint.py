"""The loss scaler's state beside a checkpoint: one small JSON file for each rank, as verl names its own.

Plain verl passes it over, and a checkpoint of plain verl has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl_fp16.loss_scaling import LossScaler, LossScaleStateError
from verl_fp16.ranks import of_all_ranks, rank_and_world_size
from verl_fp16.telling import tell
from verl_fp16.whole_files import write_whole

_START_ANEW = "To start from loss_scale.init, remove loss_scale_*.json of all ranks"


def state_file(folder: str | os.PathLike[str], rank: int, world_size: int) -> Path:
    """The file of one rank in a checkpoint's folder of one role."""
    return Path(folder) / f"loss_scale_world_size_{world_size}_rank_{rank}.json"


def save_scaler(scaler: LossScaler, folder: str | os.PathLike[str]) -> Path:
    """Write the state of ``scaler`` into a checkpoint's folder, wholly or not at all. Called on every rank.

    Returns:
        the file.
    """
    path = state_file(folder, *rank_and_world_size())
    write_whole(path, (json.dumps(scaler.state_dict()) + "\n").encode())
    return path


def load_scaler(scaler: LossScaler, folder: str | os.PathLike[str]) -> None:
    """Have ``scaler`` go on where the one that was saved into ``folder`` stopped. Called on every rank.

    Without a state, as in a checkpoint of plain verl, it goes on from its own, and says so.

    Raises:
        LossScaleStateError: a state cannot be read, or the ranks found different ones.
    """
    rank, world_size = rank_and_world_size()
    states = of_all_ranks(_read(state_file(folder, rank, world_size)))
    _refuse_different(states, folder)
    state = states[0]
    if state is None:
        missing = "is not read from there" if "://" in str(folder) else "is not there, as plain verl saves none"
        said = f"loss scale: the state in {folder} {missing}: it goes on from {scaler.scale_value:g}"
        _tell_once(rank, said)
        return
    try:
        changes = scaler.load_state_dict(state)
    except LossScaleStateError as error:
        raise LossScaleStateError(f"{folder}: {error}. {_START_ANEW}") from None
    tracked = f"after {scaler.growth_tracker} of {scaler.settings.growth_interval} updates until it grows"
    _tell_once(rank, f"loss scale {scaler.scale_value:g} from {folder}, {tracked}")
    for change in changes:
        _tell_once(rank, change)


def _read(path: Path) -> Any:
    """What is in the file; None where there is none; an error instead of a value where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) or LossScaleStateError(
            f"the loss-scale state {path} is empty. {_START_ANEW}"
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        # Raised only after the other ranks have heard of it, which would wait for this one otherwise.
        return LossScaleStateError(f"the loss-scale state {path} cannot be read: {error}. {_START_ANEW}")


def _refuse_different(states: Sequence[Any], folder: str | os.PathLike[str]) -> None:
    for state in states:
        if isinstance(state, LossScaleStateError):
            raise state
    by_state: dict[str, list[int]] = {}
    for rank, state in enumerate(states):
        by_state.setdefault(json.dumps(state, sort_keys=True) if isinstance(state, Mapping) else str(state), []).append(
            rank
        )
    if len(by_state) > 1:
        found = "; ".join(f"rank {', '.join(map(str, ranks))}: {state}" for state, ranks in by_state.items())
        raise LossScaleStateError(
            f"the ranks found different loss-scale states in {folder} ({found}), and would scale differently. Copy one "
            f"rank's file over the others'. {_START_ANEW}"
        )


def _tell_once(rank: int, said: str) -> None:
    if rank == 0:
        tell(said)
