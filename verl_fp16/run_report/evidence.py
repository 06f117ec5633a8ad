"""What a run left beside its log: what was declared and read back, alarms, skipped updates, the worst tokens."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from verl_fp16.mismatch.evidence_files import StepFolder, step_folders
from verl_fp16.run_report.places import EVIDENCE_PARTS, Place, RunError, logs_in
from verl_fp16.run_report.reading import RunLog
from verl_fp16.skip_records import SkipRecord, file_of

WORST = 5
"""Tokens that a report shows; ``verl-fp16 tokens`` shows more."""

_RULE = re.compile(r"verl_fp16\.mismatch\.alarm_(\w+)\)")
_STEP = re.compile(r"^step \d+: ")
_ADVICE = " What to do: "
_CONFIGURATIONS = ("hydra/.hydra/config.yaml", ".hydra/config.yaml")


class AlarmTold(NamedTuple):
    """A line of an alarm in the evidence.

    Attributes:
        step: of the evidence.
        rule: the setting ``verl_fp16.mismatch.alarm_<rule>``; "" where the line names none.
        text: what was wrong.
        advice: what to do; "" where the line says nothing of it.
        folder: of the step's evidence.
    """

    step: int
    rule: str
    text: str
    advice: str
    folder: Path


class SkipTold(NamedTuple):
    """The skipped updates of a role: how many, and the newest one in one line."""

    role: str
    number: int
    newest: str


@dataclass(frozen=True)
class Evidence:
    """What was found; each part is empty where it is not there.

    Args:
        declared: of the read-back: ``train_dtype``, ``rollout_dtype``, ``loss_scale`` and the other settings.
        versions: of the read-back: package -> version.
        alarms: in the order of their steps.
        newest: the newest folder of evidence.
        skips: of each role.
        tokens: the worst tokens of the first alarm's step, or of the newest one.
        tokens_of: the folder that they are of.
        planned: training steps that the run was to have; None where nobody says.
        notes: what could not be read, and why.
    """

    declared: Mapping[str, Any]
    versions: Mapping[str, str]
    alarms: tuple[AlarmTold, ...]
    newest: Path | None
    skips: tuple[SkipTold, ...]
    tokens: tuple[Mapping[str, Any], ...]
    tokens_of: Path | None
    planned: int | None
    notes: tuple[str, ...]

    @property
    def command(self) -> str | None:
        """What shows the worst tokens, to be copied."""
        return None if self.tokens_of is None else tokens_command(self.tokens_of)


def tokens_command(folder: Path) -> str:
    """What shows the worst tokens of a step's folder, to be copied."""
    return f"verl-fp16 tokens {shlex.quote(str(folder))}"


def gather(place: Place, log: RunLog) -> Evidence:
    """Read what is there; what cannot be read, or is of another run than ``log``, is a note and no error."""
    notes: list[str] = []
    if place.note:
        notes.append(f"without evidence: {place.note}")
    folder = place.evidence
    steps = _steps(folder, notes) if folder else []
    verdicts = [_is_of(step, log) for step in steps]
    if False in verdicts and True not in verdicts:
        notes.append(f"without evidence: what is in {folder} is of another run, its gaps are not those of the log")
        folder, steps = None, []
    elif False in verdicts:
        notes.append(
            f"{verdicts.count(False):,} of {len(steps):,} folders of evidence left out: their gaps are not those of "
            "the log, as where a resumed run took steps anew"
        )
        steps = [step for step, verdict in zip(steps, verdicts, strict=True) if verdict is not False]
    alarms = tuple(sorted(alarm for step in steps for alarm in _alarms(step)))
    newest = steps[-1].path if steps else None
    tokens_of = alarms[0].folder if alarms else newest
    read_back = _read_back(folder, notes) if folder else {}
    return Evidence(
        declared=_mapping(read_back.get("declared")),
        versions=_versions(read_back),
        alarms=alarms,
        newest=newest,
        skips=tuple(_skips(folder, notes)) if folder else (),
        tokens=_tokens(tokens_of, notes) if tokens_of else (),
        tokens_of=tokens_of,
        planned=_planned(place),
        notes=tuple(notes),
    )


def _steps(folder: Path, notes: list[str]) -> list[StepFolder]:
    place = folder / EVIDENCE_PARTS[0]
    try:
        return step_folders(place)
    except FileNotFoundError:
        notes.append(
            f"no evidence of the gap was written ({place} is not there): without an alarm, a run writes it every "
            "verl_fp16.mismatch.evidence_interval steps, by default 100"
        )
    except OSError as error:
        notes.append(f"{place} cannot be read: {error.strerror}")
    return []


def _is_of(step: StepFolder, log: RunLog) -> bool | None:
    """Whether the statistics in the facts are to the bit those that ``log`` has of the step; None: nobody can say."""
    verdict = None
    for name, value in _mapping((step.facts or {}).get("scalars")).items():
        series = log.series.get(name)
        if series is None or not isinstance(value, float):
            continue
        at = int(series.steps.searchsorted(step.step))
        if at < len(series.steps) and series.steps[at] == step.step:
            if series.values[at] != value:
                return False
            verdict = True
    return verdict


def _alarms(step: StepFolder) -> Iterator[AlarmTold]:
    lines = (step.facts or {}).get("alarms") or []
    for line in lines if isinstance(lines, list) else [lines]:
        text, _, advice = str(line).partition(_ADVICE)
        rule = _RULE.search(text)
        yield AlarmTold(step.step, rule[1] if rule else "", _STEP.sub("", text).rstrip("."), advice, step.path)


def _read_back(folder: Path, notes: list[str]) -> Mapping[str, Any]:
    path = folder / EVIDENCE_PARTS[1]
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        notes.append(f"{path} is not there: what was declared is not known")
    except (OSError, ValueError) as error:
        notes.append(f"{path} cannot be read: {error}")
    return {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _versions(read_back: Mapping[str, Any]) -> Mapping[str, str]:
    processes = read_back.get("processes")
    for process in processes if isinstance(processes, list) else []:
        versions = _mapping(_mapping(_mapping(process).get("report")).get("versions"))
        if versions:
            return {str(name): str(version) for name, version in versions.items()}
    return {}


def _skips(folder: Path, notes: list[str]) -> Iterator[SkipTold]:
    for role in ("actor", "critic"):
        path = file_of(folder, role)
        number, newest = 0, None
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if record := _skip(line):
                        number, newest = number + 1, record
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"{path} cannot be read: {error.strerror}")
            continue
        if newest:
            yield SkipTold(role, number, newest)


def _skip(line: str) -> str | None:
    """A record in one line; None where it is none, as a half-written one."""
    try:
        record = json.loads(line)
        return SkipRecord(**{field.name: record[field.name] for field in fields(SkipRecord)}).line()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _tokens(folder: Path, notes: list[str]) -> tuple[Mapping[str, Any], ...]:
    from verl_fp16.mismatch.evidence_reading import EvidenceError, read

    try:
        return tuple(read(folder).tokens[:WORST])
    except ImportError as error:
        notes.append(f"the worst tokens are not shown, pyarrow is needed to read them: {error}")
    except EvidenceError as error:
        notes.append(str(error))
    return ()


def _planned(place: Place) -> int | None:
    """``trainer.total_training_steps`` of the configuration that Hydra left beside the log, if that is the only one."""
    import yaml

    try:
        if logs_in(place.log.parent) != [place.log]:
            return None
    except RunError:
        return None
    for name in _CONFIGURATIONS:
        try:
            text = (place.log.parent / name).read_text(encoding="utf-8")
            config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        steps = _mapping(_mapping(config).get("trainer")).get("total_training_steps")
        if isinstance(steps, int) and not isinstance(steps, bool) and steps > 0:
            return steps
    return None
