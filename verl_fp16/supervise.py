"""Run a training command to its end and leave nothing behind (Linux only).

A distributed trainer starts processes that outlive it: Ray's daemons, inference engines in sessions of their own, and
shared-memory files. A trainer whose worker was killed may also wait for it for ever. `run_supervised` starts such a
command, watches it, says why it failed, and ends exactly the processes that belong to the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from verl_fp16.leftovers import other_run_is_alive, remove_shared_memory, shared_memory_files
from verl_fp16.processes import exit_text, is_alive, label, titles, zombie_status
from verl_fp16.run_log import last_error, telling_lines, tells_of_death

CRITICAL: tuple[str, ...] = (
    r"ray::.*WorkerDict",
    r"ray::.*ActorRolloutRef",
    r"ray::.*TaskRunner",
    r"ray::vLLMHttpServer",
    r"VLLM::EngineCore",
    r"VLLM::Worker",
    r"raylet$",
    r"gcs_server$",
)
"""Processes without which training cannot go on, matched at the start of a process's title or program name."""

_RUN_MARK = "VERL_FP16_RUN_ID"
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


@dataclass(frozen=True)
class RunResult:
    """How a supervised run ended.

    Attributes:
        returncode: exit code of the command, negative for a signal; None only if it could not be ended.
        seconds: wall-clock time from start to the end of the command, clean-up not included.
        cause: None on success, otherwise why the run failed, the first line being the short form.
        log_path: where the command's output is.
        removed_shm: shared-memory files that were left behind and have been removed.
        left_alive: processes that did not end even after SIGKILL, as "title (pid n)"; normally empty.
    """

    returncode: int | None
    seconds: float
    cause: str | None
    log_path: Path
    removed_shm: tuple[str, ...] = ()
    left_alive: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the command ended by itself with exit code 0."""
        return self.cause is None


def run_supervised(
    command: Sequence[str],
    *,
    log_path: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout_s: float | None = None,
    stall_timeout_s: float | None = None,
    heartbeat_paths: Iterable[str | os.PathLike[str]] = (),
    on_tick: Callable[[], object] | None = None,
    critical: Sequence[str] = CRITICAL,
    worker_grace_s: float = 20.0,
    end_grace_s: float = 10.0,
    poll_s: float = 0.5,
    shm_dir: str | os.PathLike[str] = "/dev/shm",
) -> RunResult:
    """Run a command to its end, then end every process it left and remove the shared memory it left.

    SIGINT, SIGTERM and SIGHUP are handled while the command runs when this is called from the main thread: the run is
    ended first, then KeyboardInterrupt or SystemExit is raised. A second signal during clean-up skips the grace period.

    Args:
        command: program and arguments, started in a session of its own with no standard input.
        log_path: file for the command's stdout and stderr; replaced if it exists.
        env: complete environment of the command; None inherits ours.
        cwd: working directory of the command.
        timeout_s: end the run after this many seconds; None for no limit.
        stall_timeout_s: end the run when neither the log nor a heartbeat file changed size for this many seconds.
        heartbeat_paths: further files that grow while the run makes progress; they need not exist yet.
        on_tick: called about every `poll_s` seconds, for a display. An exception from it ends the run and propagates.
            A process it starts must stay in our session.
        critical: regular expressions, matched from the start of a process's title or of its program's name.
        worker_grace_s: seconds the command gets to end by itself after a critical process has gone.
        end_grace_s: seconds that processes get to end after SIGINT and SIGTERM together, before SIGKILL.
        poll_s: seconds between two looks.
        shm_dir: folder in which left shared memory is looked for. Processes in another PID namespace that share this
            folder cannot be seen, so their new files would be taken for leftovers.

    Returns:
        The outcome; a failed command is a result with a cause, not an exception.

    Raises:
        OSError: the command cannot be started or the log cannot be written.
        KeyboardInterrupt: SIGINT arrived; the run has been ended.
        SystemExit: SIGTERM (code 143) or SIGHUP (code 129) arrived; the run has been ended.
    """
    log = Path(log_path)
    log.parent.mkdir(parents=True, exist_ok=True)
    shm_before = shared_memory_files(Path(shm_dir))
    removed: list[str] = []
    left: list[psutil.Process] = []
    cause: str | None = None
    failed_first = False  # whether the command's own error was there when the first worker went
    with _signals_noted() as noted, _subreaper():
        tree = _Tree(critical)
        started = time.monotonic()
        with open(log, "wb") as out:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**(os.environ if env is None else env), _RUN_MARK: tree.mark},
                start_new_session=True,
            )
        tree.adopt_main(process)
        lost: float | None = None
        growth = _Growth([log, *map(Path, heartbeat_paths)])
        try:
            while process.poll() is None and cause is None and not noted:
                tree.scan()
                if on_tick is not None:
                    on_tick()
                seconds = time.monotonic() - started
                silent_s = growth.silent_s()
                was_lost, lost = lost, tree.lost_for()
                if was_lost is None and lost is not None:
                    failed_first = last_error(log) is not None
                if timeout_s is not None and seconds > timeout_s:
                    cause = f"the run took longer than {timeout_s:g} s and was ended"
                elif stall_timeout_s is not None and silent_s > stall_timeout_s:
                    cause = f"no progress for {silent_s:.0f} s (neither the log nor a metrics file grew): run ended"
                elif lost is not None and lost > worker_grace_s:
                    cause = f"{tree.lost_text()}; the command did not end within {worker_grace_s:g} s, so it was ended"
                else:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(poll_s)
        finally:
            seconds = time.monotonic() - started
            if process.returncode is not None and cause is None and process.returncode != 0:
                cause = _end_text(process.returncode, last_error(log), tree, failed_first)
            # Ending the run makes it log errors of its own, which are not the reason.
            quoted = telling_lines(log) if cause is not None else []
            left = tree.end(process, end_grace_s, hurry=lambda: len(noted) > 1)
            # Beside another run, what nobody has open just now may be that run's.
            if not other_run_is_alive(_RUN_MARK, tree.mark):
                removed = remove_shared_memory(Path(shm_dir), shm_before)
        if on_tick is not None and not noted:
            on_tick()
    if noted:
        if noted[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + noted[0])
    if cause is not None:
        cause = "\n".join([cause, *(f"  {line}" for line in quoted if not cause.startswith(line))])
    return RunResult(process.returncode, seconds, cause, log, tuple(removed), tuple(label(p) for p in left))


def _end_text(code: int, error: str | None, tree: _Tree, failed_first: bool) -> str:
    """Why the command ended by itself: its own exception first, as far as there is one."""
    end = f"the command {exit_text(code)}"
    # Workers that went after an error of the command's own were ended by it.
    after = failed_first and error is not None and not tells_of_death(error)
    if tree.lost_for() is not None and not after:
        end += f"; before, {tree.lost_text()}"
    return f"{error} ({end})" if error is not None and code > 0 else end


class _Tree:
    """The processes of one run: found by descent, told apart by pid and creation time, never by name."""

    def __init__(self, critical: Sequence[str]) -> None:
        self.mark = uuid.uuid4().hex
        self._me = psutil.Process()
        self._sid = os.getsid(0)
        # Children from before the run, and whatever they start later, are none of our business.
        self._foreign = set(self._me.children(recursive=True))
        self._owned: set[psutil.Process] = set()
        self._sids: set[int] = set()
        self._main_pid = -1
        self._patterns = [re.compile(pattern) for pattern in critical]
        self._critical: dict[psutil.Process, str] = {}
        self._lost: dict[psutil.Process, float] = {}
        self._status: dict[psutil.Process, int] = {}

    def adopt_main(self, process: subprocess.Popen[bytes]) -> None:
        # Not reaped yet, so the pid is still ours even if the command has already ended.
        self._main_pid = process.pid
        self._sids.add(process.pid)
        self._owned.add(psutil.Process(process.pid))

    def scan(self) -> None:
        """Find new processes of the run, reap adopted ones that have ended, and note lost critical ones."""
        found = self._me.children(recursive=True)
        parents: dict[int, int] = {}
        by_parent: dict[int, list[psutil.Process]] = {}
        for child in found:
            with contextlib.suppress(psutil.Error):
                parents[child.pid] = child.ppid()
                by_parent.setdefault(parents[child.pid], []).append(child)
        pending = [child for child in found if child in self._owned]
        for child in by_parent.get(self._me.pid, []):
            if child not in self._owned and child not in self._foreign:
                if self._belongs(child):
                    pending.append(child)
                else:
                    self._foreign.add(child)
        while pending:
            process = pending.pop()
            self._owned.add(process)
            with contextlib.suppress(ProcessLookupError):
                self._sids.add(os.getsid(process.pid))
            pending += [child for child in by_parent.get(process.pid, []) if child not in self._owned]
        for process in [p for p in self._owned if not is_alive(p)]:
            self._bury(process)
        names = {process: self._critical_name(process) for process in self._owned}
        by_pid = {process.pid: name for process, name in names.items()}
        for process, name in names.items():
            # A fork carries its parent's title until it sets one: a data-loading worker may go away at any time.
            if name == "" or (name and name == by_pid.get(parents.get(process.pid, -1))):
                self._critical.pop(process, None)
            elif name:
                self._critical[process] = name

    def _critical_name(self, process: psutil.Process) -> str | None:
        """The part of the title that makes a process critical, "" if none, None if it has no title any more."""
        forms = titles(process)
        if not forms:
            return None
        matches = (pattern.match(form) for pattern in self._patterns for form in forms)
        return next((match.group() for match in matches if match), "")

    def _belongs(self, child: psutil.Process) -> bool:
        """Whether a new direct child of ours is an orphan of the run rather than a process we started ourselves."""
        try:
            sid = os.getsid(child.pid)
            if sid == self._sid:
                # The run has sessions of its own, and no process can move into an existing session.
                return False
            if sid in self._sids:
                return True
            environment = child.environ()
        except ProcessLookupError:
            return False
        except psutil.Error:
            return True
        # A process that rewrote its title has no readable environment; an intact one without the mark is not ours.
        return environment.get(_RUN_MARK) == self.mark or "PATH" not in environment

    def _bury(self, process: psutil.Process) -> None:
        """Note that a process of the run has ended, and reap it where that falls to us."""
        status = zombie_status(process)
        try:
            # The main command is left to Popen, which would lose its exit code otherwise.
            ours = status is not None and process.pid != self._main_pid and process.ppid() == self._me.pid
        except psutil.Error:
            ours = False
        if ours:
            with contextlib.suppress(ChildProcessError):
                status = os.waitpid(process.pid, os.WNOHANG)[1]
        if status is not None:
            self._status[process] = status
        if process in self._critical and process.pid != self._main_pid:
            self._lost.setdefault(process, time.monotonic())
        if status is None or ours:
            self._owned.discard(process)

    def lost_for(self) -> float | None:
        """Seconds since the first critical process went away, or None while all are there."""
        return time.monotonic() - min(self._lost.values()) if self._lost else None

    def lost_text(self) -> str:
        """Name the lost critical processes, at most three of them."""
        parts = []
        for process in list(self._lost)[:3]:
            status = self._status.get(process)
            how = "went away" if status is None else exit_text(os.waitstatus_to_exitcode(status))
            parts.append(f"{self._critical[process]} (pid {process.pid}) {how}")
        more = f" and {len(self._lost) - 3} more" if len(self._lost) > 3 else ""
        return f"worker {', '.join(parts)}{more}"

    def end(
        self, main: subprocess.Popen[bytes], grace_s: float, hurry: Callable[[], bool], kill_s: float = 15.0
    ) -> list[psutil.Process]:
        """End all processes of the run: SIGINT to the command, SIGTERM to all, SIGKILL; return what is left."""
        # The command goes first so that it can shut its own workers down in order.
        alive: list[psutil.Process] = []
        for sig, seconds in ((signal.SIGINT, grace_s / 2), (signal.SIGTERM, grace_s / 2), (signal.SIGKILL, kill_s)):
            deadline = time.monotonic() + seconds
            signalled: set[psutil.Process] = set()
            empty_rounds = 0
            while True:
                main.poll()
                self.scan()
                alive = [p for p in self._owned if is_alive(p)]
                # A process may start another and end between our look for children and our look at it: look twice.
                empty_rounds = 0 if alive else empty_rounds + 1
                if empty_rounds == 2:
                    self._reap_rest()
                    return []
                if sig == signal.SIGINT:
                    if main.returncode is not None:
                        break
                    targets = [p for p in alive if p.pid == main.pid]
                else:
                    targets = alive
                for process in targets:
                    if process not in signalled:
                        signalled.add(process)
                        with contextlib.suppress(psutil.Error):
                            process.send_signal(sig)
                if time.monotonic() > deadline or (hurry() and sig != signal.SIGKILL):
                    break
                time.sleep(0.02 if len(alive) < 20 else 0.1)
        return alive

    def _reap_rest(self, patience_s: float = 2.0) -> None:
        """Reap what ended under a parent that has ended since: its zombie comes to us a moment after that."""
        deadline = time.monotonic() + patience_s
        while True:
            self.scan()
            waiting = [p for p in self._owned if p.pid != self._main_pid and p.is_running()]
            if not waiting or time.monotonic() > deadline:
                return
            time.sleep(0.05)


class _Growth:
    """How long a set of files has kept its sizes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._sizes: list[int] = []
        self._changed = time.monotonic()

    def silent_s(self) -> float:
        sizes = []
        for path in self._paths:
            try:
                sizes.append(path.stat().st_size)
            except OSError:
                sizes.append(-1)
        if sizes != self._sizes:
            self._sizes, self._changed = sizes, time.monotonic()
        return time.monotonic() - self._changed


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP: raising at an arbitrary point could interrupt the clean-up."""
    noted: list[int] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored means that whoever started us wants us to live on, as nohup does.
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            previous[number] = signal.signal(number, lambda received, _frame: noted.append(received))
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Have orphaned descendants re-parented to this process, so that daemons of the run stay in sight."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int(0)
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a child subreaper")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
