"""The supervisor ends exactly what belongs to a run, and says why a run failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from verl_fp16.leftovers import ray_temp_dir
from verl_fp16.supervise import RunResult, run_supervised

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]

# A Ray-like daemon: double fork, a session of its own, deaf to SIGINT and SIGTERM.
DAEMON = """
import os, signal, sys, time
def daemon(pid_file):
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), file=open(pid_file + ".new", "w"))
    os.rename(pid_file + ".new", pid_file)
    time.sleep(300)
    os._exit(0)
daemon(sys.argv[1])
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
"""

# The first argument becomes the title of a process that lives for the second argument's seconds.
TITLED = """
import setproctitle, sys, time
setproctitle.setproctitle(sys.argv[1])
time.sleep(float(sys.argv[2]))
"""


def gone(pid_file: Path) -> bool:
    # A zombie left for us would still have an entry.
    return not psutil.pid_exists(int(pid_file.read_text()))


def supervised(tmp_path: Path, code: str, *arguments: object, **options) -> RunResult:
    options = {"end_grace_s": 0.4, "poll_s": 0.05, "shm_dir": tmp_path / "shm"} | options
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return run_supervised(command, log_path=tmp_path / "run.log", **options)


@pytest.fixture(autouse=True)
def no_new_children():
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    for process in left:
        process.kill()
    assert not left


@pytest.mark.parametrize("code", [0, 3])
def test_exit_code_and_output_are_passed_on(tmp_path, code):
    ticks = []
    show = f"import os, sys; print('to', os.environ['WHERE'], os.getcwd()); sys.exit({code})"
    env = {**os.environ, "WHERE": "stdout"}
    result = supervised(tmp_path, show, env=env, cwd=tmp_path, on_tick=lambda: ticks.append(1))
    assert result.returncode == code
    assert result.ok == (code == 0)
    assert (result.cause is None) == (code == 0)
    assert result.log_path.read_text() == f"to stdout {tmp_path}\n"
    assert ticks and 0 < result.seconds < 10
    if code:
        assert "exit code 3" in result.cause


def test_the_cause_names_the_signal_and_quotes_the_log(tmp_path):
    result = supervised(tmp_path, "import os; print('ValueError: no head', flush=True); os.kill(os.getpid(), 9)")
    assert result.returncode == -9
    assert "SIGKILL" in result.cause and "\n  ValueError: no head" in result.cause


@pytest.mark.parametrize(
    ("end", "options", "word"),
    [
        ("pass", {}, None),
        ("sys.exit(1)", {}, "exit code 1"),
        ("time.sleep(20)", {"timeout_s": 1.5}, "longer than 1.5 s"),
        ("time.sleep(20)", {"stall_timeout_s": 1.5}, "no progress"),
    ],
    ids=["success", "failure", "timeout", "stall"],
)
def test_a_deaf_daemon_in_its_own_session_is_gone(tmp_path, end, options, word):
    pid_file = tmp_path / "pid"
    result = supervised(tmp_path, DAEMON + end, pid_file, **options)
    assert gone(pid_file)
    assert result.left_alive == ()
    assert result.cause is None if word is None else word in result.cause


def test_a_daemon_that_hid_its_environment_is_gone(tmp_path):
    """setproctitle overwrites the memory in which the environment is read, so the mark cannot be relied on alone."""
    hide = "import setproctitle; setproctitle.setproctitle('x' * 9000)"
    code = DAEMON.replace("    time.sleep(300)", f"    {hide}\n    time.sleep(300)")
    # One look at the start and one at the end: the daemon is never seen below the command.
    supervised(tmp_path, code, tmp_path / "pid", poll_s=5)
    assert gone(tmp_path / "pid")


def test_growing_heartbeat_is_no_stall(tmp_path):
    code = "import sys, time\nfor i in range(22): open(sys.argv[1], 'a').write('x'); time.sleep(0.1)"
    beat = tmp_path / "beat"
    assert supervised(tmp_path, code, beat, stall_timeout_s=1.5, heartbeat_paths=[beat]).ok
    assert not supervised(tmp_path, code, beat, stall_timeout_s=1.5).ok


def test_processes_of_others_are_left_alone(tmp_path):
    nap = [sys.executable, "-c", "import time; time.sleep(300)"]
    before = [subprocess.Popen(nap), subprocess.Popen(nap, start_new_session=True, env={})]
    meanwhile: list[subprocess.Popen] = []

    def on_tick() -> None:
        if not meanwhile:
            meanwhile.extend([subprocess.Popen(nap, env={}), subprocess.Popen(nap, start_new_session=True)])

    try:
        assert supervised(tmp_path, "import time; time.sleep(0.6)", on_tick=on_tick).ok
        assert [process.poll() for process in before + meanwhile] == [None] * 4
    finally:
        for process in before + meanwhile:
            process.kill()
            process.wait()


def test_an_error_of_the_display_ends_the_run(tmp_path):
    pid_file = tmp_path / "pid"

    def on_tick() -> None:
        if pid_file.exists():
            raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        supervised(tmp_path, DAEMON + "time.sleep(300)", pid_file, on_tick=on_tick)
    assert gone(pid_file)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 7), (signal.SIGTERM, 143)])
def test_a_signal_to_the_supervisor_ends_the_run(tmp_path, number, code):
    pid_file, script = tmp_path / "pid", tmp_path / "outer.py"
    script.write_text(
        "import sys\n"
        "from verl_fp16.supervise import run_supervised\n"
        "try:\n"
        f"    run_supervised([sys.executable, '-c', {DAEMON + 'time.sleep(300)'!r}, {str(pid_file)!r}],\n"
        f"        log_path={str(tmp_path / 'log')!r}, end_grace_s=0.4, shm_dir={str(tmp_path)!r})\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(7)\n"
    )
    outer = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for _ in range(400):
            if not pid_file.exists():
                time.sleep(0.02)
        outer.send_signal(number)
        assert outer.wait(15) == code
        assert gone(pid_file)
    finally:
        outer.kill()
        outer.wait()


# Starts a critical process, tells its pid, and waits for ever whatever happens to it.
HANGING = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {TITLED!r}, "ray::WorkerDict.update_actor", "300"])
open(sys.argv[1], "w").write(str(worker.pid))
print("RuntimeError: CUDA error: an illegal memory access", flush=True)
time.sleep(300)
"""


def test_death_of_a_worker_ends_a_hanging_run(tmp_path):
    pid_file = tmp_path / "pid"
    seen: list[int] = []
    killed_at: list[float] = []

    def on_tick() -> None:
        if pid_file.exists() and pid_file.read_text() and not killed_at:
            process = psutil.Process(int(pid_file.read_text()))
            seen.extend([1] * process.cmdline()[0].startswith("ray::"))
            # The supervisor must have had a look at it under its title.
            if len(seen) > 3:
                process.kill()
                killed_at.append(time.monotonic())

    result = supervised(tmp_path, HANGING, pid_file, on_tick=on_tick, worker_grace_s=0.5)
    first, *quoted = result.cause.splitlines()
    assert f"ray::WorkerDict (pid {pid_file.read_text()}) was killed by SIGKILL" in first
    assert "did not end within 0.5 s" in first
    # What the command logs because it is being ended is not quoted.
    assert quoted == ["  RuntimeError: CUDA error: an illegal memory access"]
    assert "KeyboardInterrupt" in result.log_path.read_text()
    assert 0.5 < time.monotonic() - killed_at[0] < 5


def test_a_worker_lost_before_a_failure_is_named(tmp_path):
    code = HANGING.replace("time.sleep(300)\n", "time.sleep(1.2); worker.terminate(); time.sleep(0.4); sys.exit(1)\n")
    cause = supervised(tmp_path, code, tmp_path / "pid").cause
    assert cause.startswith("the command ended with exit code 1; before, worker ray::WorkerDict (pid ")


FAILING = HANGING.replace(
    "time.sleep(300)\n",
    """time.sleep(1.2)
import traceback
try:
    open("/no/such/train.parquet")
except OSError:
    traceback.print_exc()
worker.terminate()
time.sleep(0.4)
sys.exit(1)
""",
)


def test_the_commands_own_error_goes_first_and_workers_that_left_after_it_are_not_named(tmp_path):
    first, *quoted = supervised(tmp_path, FAILING, tmp_path / "pid").cause.splitlines()
    error = "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/train.parquet'"
    assert first == f"{error} (the command ended with exit code 1)"
    assert quoted == ["  RuntimeError: CUDA error: an illegal memory access"]


def test_an_error_that_tells_of_a_lost_worker_goes_before_its_name(tmp_path):
    code = FAILING.replace('open("/no/such/train.parquet")', 'raise OSError("The actor died")')
    first = supervised(tmp_path, code, tmp_path / "pid").cause.splitlines()[0]
    assert first.startswith("OSError: The actor died (the command ended with exit code 1; before, worker ray::Worker")


def test_workers_that_go_first_are_a_normal_end(tmp_path):
    code = f"""
import subprocess, sys, time
workers = [subprocess.Popen([sys.executable, "-c", {TITLED!r}, title, "1"]) for title in ("ray::WorkerDict", "raylet")]
[worker.wait() for worker in workers]
time.sleep(0.8)
"""
    assert supervised(tmp_path, code, worker_grace_s=5).ok
    # The same end is a failure once the grace period is shorter, so the workers were indeed seen to go.
    assert "ray::WorkerDict" in supervised(tmp_path, code, worker_grace_s=0.3).cause


def test_forks_and_mentions_of_a_worker_are_not_critical(tmp_path):
    """A data-loading fork carries the worker's title; Ray's idle workers name the raylet in their arguments."""
    code = """
import os, setproctitle, subprocess, sys, time
idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)", "--raylet-name=raylet"])
if os.fork() == 0:
    setproctitle.setproctitle("ray::TaskRunner.run")
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
    os.wait()
    time.sleep(1.5)
    os._exit(0)
idle.wait()
os.wait()
"""
    assert supervised(tmp_path, code, worker_grace_s=0.3).ok


def test_only_our_unused_shared_memory_is_removed(tmp_path):
    (shm := tmp_path / "shm").mkdir()
    (shm / "psm_before").write_bytes(b"x" * 4096)
    code = """
import sys
for name in ("psm_left", "verl_weights_left", "sem.mp-left", "psm_open", "other_left"):
    open(sys.argv[1] + "/" + name, "wb").write(b"x" * 4096)
import time; time.sleep(0.6)
"""
    held: list[object] = []

    def on_tick() -> None:
        if not held and (shm / "other_left").exists():
            held.append(open(shm / "psm_open", "rb"))

    result = supervised(tmp_path, code, shm, on_tick=on_tick)
    assert result.removed_shm == ("psm_left", "sem.mp-left", "verl_weights_left")
    assert sorted(path.name for path in shm.iterdir()) == ["other_left", "psm_before", "psm_open"]
    held[0].close()


def test_shared_memory_mapped_by_a_foreign_process_is_kept(tmp_path):
    (shm := tmp_path / "shm").mkdir()
    # Without its descriptor, which the map object keeps a copy of, a file is in use through the mapping alone.
    code = """
import mmap, os, sys, time
m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
os.closerange(3, 100)
print(flush=True)
time.sleep(60)
"""
    other: list[subprocess.Popen] = []

    def on_tick() -> None:
        if not other and (shm / "psm_new").exists() and (shm / "psm_new").stat().st_size:
            other.append(subprocess.Popen([sys.executable, "-c", code, shm / "psm_new"], stdout=subprocess.PIPE))
            other[0].stdout.readline()

    make = "import sys, time; open(sys.argv[1] + '/psm_new', 'wb').write(bytes(4096)) and time.sleep(1)"
    try:
        assert supervised(tmp_path, make, shm, on_tick=on_tick).removed_shm == ()
        assert (shm / "psm_new").exists()
    finally:
        for process in other:
            process.kill()
            process.communicate()
    assert len(other) == 1


def test_ray_temp_dir_is_short_and_temporary(monkeypatch, tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with ray_temp_dir() as path:
        (path / "session_x").mkdir()
        assert len(f"{path}/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store_1") < 107
    assert not path.exists()
    assert list(long.iterdir()) == []


def test_a_zombie_whose_parent_was_killed_is_reaped(tmp_path):
    """A worker that ends under a daemon that does not wait for it becomes ours only when the daemon is killed."""
    daemon = (
        "import os, signal, subprocess, sys, time\n"
        "os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'pass'])\n"
        "open(sys.argv[1], 'w').write('up'); time.sleep(300)\n"
    )
    command = (
        "import subprocess, sys, time, pathlib\n"
        f"subprocess.Popen([sys.executable, '-c', {daemon!r}, sys.argv[1]])\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\n"
        "time.sleep(1)\n"
    )
    before = set(psutil.Process().children())
    result = run_supervised(
        [sys.executable, "-c", command, str(tmp_path / "up")], log_path=tmp_path / "log", end_grace_s=0.5
    )
    assert result.ok, result.cause
    assert set(psutil.Process().children()) - before == set()


def test_shared_memory_is_left_alone_while_another_run_is_alive(tmp_path):
    shm = tmp_path / "shm"
    shm.mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    other = subprocess.Popen(sleep, env={**os.environ, "VERL_FP16_RUN_ID": "another"})
    try:
        make = [sys.executable, "-c", f"open({str(shm / 'psm_whose')!r}, 'w').write('x')"]
        assert run_supervised(make, log_path=tmp_path / "log", shm_dir=shm).removed_shm == ()
        assert (shm / "psm_whose").exists()
    finally:
        other.kill()
        other.wait()
    assert run_supervised(make, log_path=tmp_path / "log", shm_dir=shm).removed_shm == ()
    (shm / "psm_whose").unlink()
    assert run_supervised(make, log_path=tmp_path / "log", shm_dir=shm).removed_shm == ("psm_whose",)
