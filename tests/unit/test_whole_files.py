"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os

import pytest

from verl_fp16.whole_files import taking_its_place, write_whole


def test_what_is_written_takes_the_place(tmp_path):
    file = tmp_path / "a.json"
    write_whole(file, b"old")
    write_whole(file, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"new"}


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError(28, "No space left on device")))
@pytest.mark.parametrize("where", ("writing", "replacing"))
def test_what_is_interrupted_leaves_the_old_one_and_nothing_else(error, where, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    file = tmp_path / "a.json"
    write_whole(file, b"old")
    if where == "replacing":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((KeyboardInterrupt, OSError)), taking_its_place(file) as fresh:
        fresh.write_bytes(b"half")
        if where == "writing":
            fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"old"}


def test_a_pipe_or_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # also a writer: nothing waits for the other end
    try:
        write_whole(pipe, b"new")
        assert os.read(reader, 100) == b"new"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
