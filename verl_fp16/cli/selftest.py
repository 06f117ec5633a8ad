"""``verl-fp16 selftest``: proof that FP16 works here, before a long run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from verl_fp16.cli.output import fail, is_terminal, print_table, require_folder
from verl_fp16.cli.progress import clock
from verl_fp16.whole_files import write_whole

if TYPE_CHECKING:
    from verl_fp16.selftest.driver import Asked, Tell
    from verl_fp16.selftest.rows import Row

INTERRUPTED = 130
_STYLES = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow"}
_SECONDS_BETWEEN_LINES = 10.0
_LOOK_S = 300.0


def register(app: typer.Typer) -> None:
    app.command("selftest")(selftest)


def selftest(
    gpus: Annotated[
        int, typer.Option("--gpus", min=1, metavar="N", help="GPUs to use; without any, processes on the CPU.")
    ] = 1,
    model: Annotated[
        Path | None,
        typer.Option("--model", readable=False, help="Your model, for run and gap; a small one is made without it."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="For the gap: verl's Parquet, JSON lines, or text; sums without it."),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Of doctor,engine,run,gap,throughput, with commas between.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for a report of a bug.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for logs and what is made.")] = Path("outputs")
    / "selftest",
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE", help="Write date, GPU, versions and rows as JSON.")
    ] = None,
) -> None:
    """Prove FP16 on this machine: engine, a short verl run, the gap to BF16, and speed; under ten minutes.

    The exit code is 0 where nothing failed, 1 where something did, 2 for a wrong input, 130 after Ctrl-C.
    """
    require_folder(output)
    stages = _stages(only)
    for path, option in ((model, "--model"), (prompts, "--prompts")):
        _require(path, option)
    for path, option in ((model, "--model"), (output, "--output")):
        if path is not None and any(part in str(path.absolute()) for part in ("\\", "${", "\n")):
            raise fail(f"{option} {str(path)!r}: it has a character that Hydra cannot take. Name another")
    if record is not None:
        _require_writable(record)
    from verl_fp16.selftest import driver, machine
    from verl_fp16.selftest.alone import Taken, alone_in
    from verl_fp16.selftest.rows import exit_code

    try:
        with _progress() as tell:
            devices = _devices()
            asked = _asked(output, devices, gpus, model, prompts, stages)
            with alone_in(asked.output):
                rows, facts = driver.run(asked, tell)
    except Taken as error:
        raise fail(f"--output {output}: {error}. Wait for it, or name another") from None
    except OSError as error:
        raise fail(f"{error.filename or output}: {error.strerror or error}. Name another --output") from None
    except KeyboardInterrupt:
        raise fail("interrupted; everything that was started has been ended", INTERRUPTED) from None
    content = {"date": date.today().isoformat(), "device": asked.device, "gpus": list(asked.gpu_names)}
    content |= {"versions": machine.versions(devices), "hooks": machine.hooks(facts.get("doctor"))}
    content |= {"asked": {"gpus": gpus, "model": None if model is None else "given", "only": list(stages)}}
    content |= {"rows": [vars(row) for row in rows]}
    hidden = machine.private(os.environ, {"<model>": model, "<prompts>": prompts, "<output>": output})
    content = machine.scrubbed(content, hidden)
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        _show(rows, output)
    if record is not None:
        _write_record(record, content)
    raise typer.Exit(exit_code(rows))


def _stages(text: str | None) -> tuple[str, ...]:
    from verl_fp16.selftest.plan import CHOOSABLE

    if text is None:
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in CHOOSABLE:
            raise fail(f"--only {name or repr(text)}: there is no such stage. Name some of {', '.join(CHOOSABLE)}")
    return names


def _require(path: Path | None, option: str) -> None:
    """
    Raises:
        typer.Exit: a model's folder or a file of prompts is not there.
    """
    from verl_fp16.preflight.refusals import CONFIG

    if path is None:
        return
    if not path.exists():
        if option == "--model":
            raise fail(f"{option} {path}: there is no such folder. Name a Hugging Face model, with its tokenizer")
        raise fail(f"{option} {path}: there is no such file. Give verl's Parquet, JSON lines, or text with one a line")
    if option == "--model" and not (path / CONFIG).is_file():
        raise fail(f"{option} {path}: there is no {CONFIG} in it. Name a Hugging Face model folder, with its tokenizer")
    if option == "--prompts" and path.is_dir():
        raise fail(f"{option} {path}: this is a folder, and a file is needed. Name one in it")


def _require_writable(record: Path) -> None:
    """
    Raises:
        typer.Exit: it is seen beforehand that the record cannot be written.
    """
    folder = record.absolute().parent
    if not folder.is_dir():
        raise fail(f"--record {record}: there is no folder {folder}. Make it, or name another")
    if record.exists() and not record.is_file():
        raise fail(f"--record {record}: this is no file that can be replaced. Name another")
    try:
        with tempfile.TemporaryFile(dir=folder):  # who may write is not all: a full disk, /proc
            pass
    except OSError as error:
        raise fail(f"--record {record}: nothing can be written to {folder}: {error.strerror}. Name another") from None


def _devices() -> dict[str, Any]:
    from verl_fp16.doctor.examination import look

    return look("devices", os.environ, _LOOK_S)


def _asked(
    output: Path, devices: dict[str, Any], gpus: int, model: Path | None, prompts: Path | None, only: Sequence[str]
) -> Asked:
    from verl_fp16.cpu.choice import ENV_VAR, PLATFORM, chosen_by_environment
    from verl_fp16.installed import VerlNotFound, find_verl
    from verl_fp16.launch import launch_environment
    from verl_fp16.selftest import machine
    from verl_fp16.selftest.driver import Asked

    if "failed" in devices:
        raise fail(f"torch's look at the GPUs failed: {devices['failed']}. `verl-fp16 doctor` says more")
    there = len(devices["gpus"])
    cores = len(os.sched_getaffinity(0))
    if there and gpus > there:
        raise fail(f"--gpus {gpus}: torch sees {there}. Give at most so many")
    if not there and gpus > cores:
        raise fail(f"--gpus {gpus}: torch sees no GPU, and there are {cores} cores for processes. Give at most so many")
    if there and chosen_by_environment():
        raise fail(
            f"{ENV_VAR}={os.environ[ENV_VAR]}, and torch sees a GPU: unset it, or set CUDA_VISIBLE_DEVICES= to test "
            "the CPU"
        )
    environment = {} if there else {ENV_VAR: PLATFORM}
    with contextlib.suppress(VerlNotFound):  # a row of the doctor's
        environment |= launch_environment(find_verl(), os.environ)
    paths = (None if path is None else path.absolute() for path in (model, prompts))
    return Asked(
        output.absolute(),
        "gpu" if there else "cpu",
        gpus,
        *paths,
        tuple(only),
        environment,
        gpu_names=tuple(machine.gpu_names(devices)),
        gpu_bytes=min((gpu["memory"] for gpu in devices["gpus"]), default=None),
        unseen_gpu=machine.unseen_gpu(devices, os.environ),
        hidden_by="" if there else machine.hidden_by(os.environ),
    )


@contextlib.contextmanager
def _progress() -> Iterator[Tell]:
    """The stage, what is under way in it and the time left: a spinner on a terminal, elsewhere a line now and then."""
    if not is_terminal(sys.stderr):
        typer.echo("verl-fp16: looking for GPUs", err=True)
        yield _lines()
        return
    from rich.console import Console

    with Console(stderr=True).status("looking for GPUs") as status:
        yield lambda *what: status.update(_line(*what))


def _lines() -> Tell:
    last: tuple[int, float] = (0, 0.0)

    def tell(number: int, of: int, stage: str, told: str, left_s: float) -> None:
        nonlocal last
        now = time.monotonic()
        if number != last[0] or now - last[1] >= _SECONDS_BETWEEN_LINES:
            last = (number, now)
            typer.echo(f"verl-fp16: {_line(number, of, stage, told, left_s)}", err=True)

    return tell


def _line(number: int, of: int, stage: str, told: str, left_s: float) -> str:
    return f"stage {number} of {of}, {stage}{f': {told}' if told else ''}, about {clock(left_s)} left"


def _write_record(file: Path, content: dict[str, Any]) -> None:
    wanted = ("name", "status", "reason", "seconds")
    found = {
        "date": content["date"],
        "gpu": ", ".join(content["gpus"]) or None,
        "driver": content["versions"].get("driver"),
        "versions": content["versions"],
        "rows": [{name: row[name] for name in wanted} for row in content["rows"]],
    }
    try:
        write_whole(file, (json.dumps(found, indent=2) + "\n").encode())
    except OSError as error:
        raise fail(
            f"--record {file}: {error.strerror or error}. The result is what was printed; name another next time"
        ) from None


def _show(rows: Sequence[Row], output: Path) -> None:
    from rich.text import Text

    cells = []
    for row in rows:
        reason = f"{row.reason} (log: {output / row.log})" if row.status == "FAIL" and row.log else row.reason
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        cells.append((row.name, Text(row.status, style=_STYLES[row.status]), reason, seconds))
    print_table(("test", "result", "why", "seconds"), cells)
    failed = [row.name for row in rows if row.status == "FAIL"]
    skipped = sum(row.status == "SKIP" for row in rows)
    more = f", {skipped} not tested" if skipped else ""
    typer.echo(f"FP16 is not fit here: {', '.join(failed)}{more}" if failed else f"Nothing failed{more}.")
