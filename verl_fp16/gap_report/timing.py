"""How fast a stage is: what its first moments cost is left out, and of several passes the fastest counts."""

from __future__ import annotations

import time


class Passes:
    """Passes over the same work, made for a while: a single one tells as much of the machine's other work as of this.

    Args:
        least_s: seconds of all passes together, after which there are enough; of 0, one pass is.
    """

    def __init__(self, least_s: float) -> None:
        self._least, self._passes = least_s, 0
        self._timed = 0.0
        self._fastest: tuple[int, float] | None = None

    @property
    def enough(self) -> bool:
        return self._passes > 0 and self._timed >= self._least

    def add(self, tokens: int, seconds: float) -> None:
        self._passes += 1
        self._timed += seconds
        if seconds > 0 and (self._fastest is None or tokens / seconds > self._fastest[0] / self._fastest[1]):
            self._fastest = (tokens, seconds)

    def found(self) -> dict[str, float] | None:
        """``tokens`` and ``seconds`` of the fastest pass, and ``timed_s``, seconds of all; None of no time at all."""
        if self._fastest is None:
            return None
        return {"tokens": self._fastest[0], "seconds": self._fastest[1], "timed_s": self._timed}


class Forwards:
    """Tokens and seconds of forwards, the first one left out: it is when memory is taken and kernels are chosen."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self._first = True

    def start(self) -> None:
        self._began = time.monotonic()

    def stop(self, tokens: int) -> None:
        if not self._first:
            self.tokens += tokens
            self.seconds += time.monotonic() - self._began
        self._first = False
