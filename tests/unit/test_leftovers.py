"""Shared memory is given back when nobody uses it, and nothing else is touched."""

from __future__ import annotations

import pytest

from verl_fp16.leftovers import shared_memory_given_back


@pytest.mark.parametrize("fails", (False, True))
def test_what_was_left_meanwhile_is_removed(tmp_path, fails):
    (tmp_path / "psm_before").write_bytes(b"1")
    try:
        with shared_memory_given_back(tmp_path):
            (tmp_path / "psm_left").write_bytes(b"2")
            (tmp_path / "mine").write_bytes(b"3")
            used = open(tmp_path / "psm_used", "wb")
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "psm_before", "psm_used"]
    used.close()
