"""How a run is refused: one message and a non-zero exit code in verl's launcher, an ordinary exception elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Refused(SystemExit):
    """Ends verl's launcher with one message on stderr and exit code 1.

    Hydra wraps an Exception of the program or of a resolver into a traceback of its own frames, in which the message
    drowns. A SystemExit passes through both.
    """


class GuardError(ValueError):
    """The configuration contradicts the precision flag; the message lists every contradiction."""


def in_launcher() -> bool:
    """Whether this process is a program started by Hydra's command line: never a Ray worker, nor a notebook."""
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.initialized()


@contextmanager
def one_message(*kinds: type[Exception]) -> Iterator[None]:
    """In verl's launcher, turn an exception of these kinds into :class:`Refused`."""
    try:
        yield
    except kinds as error:
        if in_launcher():
            text = str(error)
            raise Refused(text if text.startswith("verl_fp16") else f"verl_fp16: {text}") from None
        raise
