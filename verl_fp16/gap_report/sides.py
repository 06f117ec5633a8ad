"""What is held against what: a training side and a rollout side, each by its precision; and the ladder of causes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from verl_fp16.gap_report.errors import GapError
from verl_fp16.sampling import DTYPES


@dataclass(frozen=True)
class Rollout:
    """vLLM's side.

    Args:
        precision: fp16, bf16 or fp32: what vLLM loads the weights in and computes in.
        weights: precision that the weights are rounded to beforehand; None where they are as they are stored.
        temperature, top_p: of sampling.
        raw: whether its log-probabilities are those before temperature and top_p.
    """

    precision: str
    weights: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    raw: bool = False

    @property
    def slug(self) -> str:
        """Names its files."""
        parts = [self.precision]
        parts += [f"weights-{self.weights}"] if self.weights else []
        parts += [f"temperature-{self.temperature:g}"] if self.temperature != 1 else []
        parts += [f"top-p-{self.top_p:g}"] if self.top_p != 1 else []
        return "-".join([*parts, "raw"] if self.raw else parts)


@dataclass(frozen=True)
class Training:
    """The side of verl's FSDP engine.

    Args:
        precision: fp16, bf16 or fp32: what FSDP casts the FP32 master weights to and autocast computes in.
        fp32_head: whether logits are computed in FP32 from the last hidden states and the cast weights.
        temperature: that logits are divided by, the rollout's.
    """

    precision: str
    fp32_head: bool = False
    temperature: float = 1.0

    @property
    def slug(self) -> str:
        parts = [self.precision, *(["fp32-head"] if self.fp32_head else [])]
        return "-".join([*parts, f"temperature-{self.temperature:g}"] if self.temperature != 1 else parts)


@dataclass(frozen=True)
class Measurement:
    """Both sides on the tokens of one of the rollouts.

    Args:
        name: as it is written in tables.
        tokens: the rollout that sampled them.
        scored: whether ``rollout`` scores them, many positions at a time; or has sampled them, one after the other.
            What is compared on the same tokens is scored by all.
    """

    name: str
    training: Training
    rollout: Rollout
    tokens: Rollout
    scored: bool = False


def parse_pairs(text: str, same_tokens: bool) -> list[Measurement]:
    """``bf16,fp16`` or ``bf16/fp16,fp32`` (TRAINING/ROLLOUT); each once, in their order.

    Args:
        same_tokens: whether the first one's rollout samples for all of them, or each for itself.

    Raises:
        GapError: naming the part that is none.
    """
    found: dict[str, Measurement] = {}
    for part in text.split(","):
        sides = [side.strip().lower() for side in part.split("/")]
        sides = sides * 2 if len(sides) == 1 else sides
        if len(sides) != 2 or any(side not in DTYPES for side in sides):
            raise GapError(
                f"--precision {part.strip() or repr(text)}: it has to be {', '.join(DTYPES)}, or TRAINING/ROLLOUT as "
                "bf16/fp16; several with commas between"
            )
        train, rollout = sides
        one = Measurement(_pair(train, rollout), Training(train), Rollout(rollout), Rollout(rollout))
        first = next(iter(found.values()), one)
        found.setdefault(one.name, replace(one, tokens=first.rollout, scored=True) if same_tokens else one)
    return list(found.values())


def ladder() -> list[Measurement]:
    """Which cause carries how much: all on the tokens that FP16 sampled, but the last two, which sample their own."""
    fp16 = Rollout("fp16")
    cool, nucleus = Rollout("fp16", temperature=0.6, raw=True), Rollout("fp16", top_p=0.8)

    def scored(name: str, training: Training, rollout: Rollout) -> Measurement:
        return Measurement(name, training, rollout, fp16, scored=True)

    return [
        *(scored(name, Training(name), Rollout(name)) for name in ("bf16", "fp16", "fp32")),
        *(
            scored(_pair(*sides), Training(sides[0]), Rollout(sides[1]))
            for sides in (("bf16", "fp16"), ("fp16", "bf16"))
        ),
        scored("bf16, FP32 head in training", Training("bf16", fp32_head=True), Rollout("bf16")),
        scored("fp16, rollout weights rounded to BF16", Training("fp16"), Rollout("fp16", weights="bf16")),
        Measurement("fp16, log-probs of sampling", Training("fp16"), fp16, fp16),
        Measurement("fp16, top_p 0.8", Training("fp16"), nucleus, nucleus),
        Measurement("fp16, temperature 0.6, raw log-probs", Training("fp16", temperature=0.6), cool, cool),
    ]


def _pair(train: str, rollout: str) -> str:
    return train if train == rollout else f"{train}/{rollout}"
