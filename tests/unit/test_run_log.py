"""What a run's log tells of its end: the lines of errors, and the command's own last one."""

from __future__ import annotations

import pytest

from verl_fp16.run_log import last_error, telling_lines

pytestmark = pytest.mark.unit

RAY_LOG = """\
Training Progress:  10%|#         | 1/10 [00:05<00:45]\rTraining Progress:  20%|##        | 2/10 [00:10<00:40]
\x1b[36m(WorkerDict pid=4242)\x1b[0m INFO 11-21 03:49:09 [gpu.py:10] memory utilization 0.5: no Out of memory
\x1b[36m(WorkerDict pid=4242, ip=192.0.2.2)\x1b[0m Traceback (most recent call last):
\x1b[36m(WorkerDict pid=4242, ip=192.0.2.2)\x1b[0m torch.OutOfMemoryError: CUDA out of memory. 2.00 GiB
\x1b[36m(WorkerDict pid=4243)\x1b[0m torch.OutOfMemoryError: CUDA out of memory. 3.00 GiB [repeated 3x across cluster]
\x1b[36m(vLLMHttpServer pid=5151)\x1b[0m ERROR 11-21 03:49:09 [core.py:702] RuntimeError: engine core is gone
\x1b[33m(raylet)\x1b[0m A worker died or was killed. Lease ID: 00000000a3914051403796855639b563 Worker PID: 4242
Traceback (most recent call last):
    ray.get(runner.run.remote(config))
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: WorkerDict
\tpid: 4242
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR
"""


def test_telling_lines_of_a_ray_traceback(tmp_path):
    log = tmp_path / "log"
    log.write_text(RAY_LOG)
    assert telling_lines(log) == [
        "WorkerDict: torch.OutOfMemoryError: CUDA out of memory. 2.00 GiB",
        "vLLMHttpServer: RuntimeError: engine core is gone",
        "raylet: A worker died or was killed. Worker PID: 4242",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
    ]
    assert [line[:16] for line in telling_lines(log, 2)] == ["WorkerDict: torc", "The actor is dea"]


PRINTED = """\
(TaskRunner pid=1)   'save_path': 'outputs/profile out of memory',
(TaskRunner pid=1) {'actor_rollout_ref': {'actor': {'note': 'CUDA error'},
2026-11-22 20:11:55,120 WARNING worker.py:12 -- RuntimeError: not the cause, worker died
WARNING:2026-11-22 20:11:55,120:CUDA error mentioned
/usr/lib/python3/x.py:12: UserWarning: Out of memory is possible
"""


def test_warnings_and_the_printed_configuration_are_not_telling(tmp_path):
    log = tmp_path / "log"
    log.write_text(PRINTED + "(TaskRunner pid=1) ValueError: the cause\n")
    assert telling_lines(log) == ["TaskRunner: ValueError: the cause"]
    log.write_text(PRINTED + "the end\n")
    assert telling_lines(log) == ["the end"]


DRIVER = """\
Error executing job with overrides: []
Traceback (most recent call last):
  File "main_ppo.py", line 12, in main
ray.exceptions.RayTaskError(FileNotFoundError): ray::TaskRunner.run() (pid=12, ip=192.0.2.2)
  File "dataset.py", line 7, in __init__
FileNotFoundError: Unable to find 'train.parquet'
"""


def test_the_last_error_is_the_commands_own(tmp_path):
    log = tmp_path / "log"
    assert last_error(log) is None
    log.write_text("ValueError: printed, not raised\n(TaskRunner pid=1) Traceback (most recent call last):\n")
    assert last_error(log) is None
    log.write_text(
        DRIVER + "(raylet pid=3) OSError: gone\nException ignored in: <f>\n" + DRIVER[39:73] + "\nKeyError: 1\n"
    )
    assert last_error(log) == "FileNotFoundError: Unable to find 'train.parquet'"


def test_telling_lines_stay_small(tmp_path):
    log = tmp_path / "log"
    assert telling_lines(log) == []
    log.write_bytes(b"\xff" * 3_000_000 + b"\n" + b"ValueError: " + b"y" * 2_000 + b"\nthe end\n")
    lines = telling_lines(log)
    assert len(lines) == 1 and lines[0].startswith("ValueError: yyy") and len(lines[0]) == 300
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    assert telling_lines(log, 2) == ["line 98", "line 99"]
    assert telling_lines(log, 2, errors_only=True) == []
    log.write_text("ValueError: old\nValueError: new\n")
    assert telling_lines(log, since=16) == ["ValueError: new"]
