"""What can be said of sampling without vLLM."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from verl_fp16.sampling import interrupts_pass


@pytest.fixture(autouse=True)
def heard():
    """Where pytest was started with Ctrl-C ignored, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_while_it_is_caught() -> None:
    with suppress(KeyboardInterrupt):  # as vLLM does while its engine starts
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_also_what_would_take_it_for_nothing():
    interrupted_while_it_is_caught()
    with pytest.raises(KeyboardInterrupt), interrupts_pass():
        interrupted_while_it_is_caught()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_handles_ctrl_c_otherwise_keeps_doing_so():
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        with interrupts_pass():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
