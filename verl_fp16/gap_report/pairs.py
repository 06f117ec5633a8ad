"""Which precisions are held against each other."""

from __future__ import annotations

from dataclasses import dataclass

SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Pair:
    """Training side and rollout side, each a dtype by torch's name."""

    train: str
    rollout: str

    @property
    def name(self) -> str:
        """As it is written: ``fp16``, or ``bf16/fp16`` for training in BF16 and rollout in FP16."""
        train, rollout = (next(short for short, long in SHORT.items() if long == side) for side in self)
        return train if train == rollout else f"{train}/{rollout}"

    def __iter__(self):
        return iter((self.train, self.rollout))


def parse_pairs(text: str) -> list[Pair]:
    """``bf16,fp16`` or ``bf16/fp16,fp32``; each once, in their order.

    Raises:
        ValueError: naming the part that is none.
    """
    pairs = []
    for part in text.split(","):
        sides = [side.strip().lower() for side in part.split("/")]
        sides = sides * 2 if len(sides) == 1 else sides
        if len(sides) != 2 or any(side not in SHORT for side in sides):
            raise ValueError(
                f"{part.strip() or text!r} is no precision: {', '.join(SHORT)}, or TRAINING/ROLLOUT, such as bf16/fp16"
            )
        pairs.append(Pair(*(SHORT[side] for side in sides)))
    return list(dict.fromkeys(pairs))
