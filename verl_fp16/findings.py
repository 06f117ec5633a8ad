"""What is wrong with a configuration, as data, and how it is told to the user. Imports nothing of verl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One setting that cannot do what it says.

    Args:
        severity: an ``error`` stops the run before it starts, a ``warning`` is printed.
        key: the setting, as in an override.
        value: what it is set to.
        why: what happens with it, and why that matters.
        fix: Hydra overrides which, all together, remove this finding.
        advice: what to do where no override helps, or beside it.
    """

    severity: Literal["error", "warning"]
    key: str
    value: Any
    why: str
    fix: tuple[str, ...] = ()
    advice: str = ""

    def __post_init__(self) -> None:
        if not (self.fix or self.advice):
            raise ValueError(f"a finding has to say what to do: {self.key}")

    def lines(self, indent: str = "   ") -> list[str]:
        """Key and value, why, and the fix, a line each."""
        # As a shell takes it: an interpolation has to be quoted.
        ways_out = " ".join(f"'{fix}'" if "$" in fix else fix for fix in self.fix), self.advice
        return [
            f"{self.key}={written(self.value)}",
            f"{indent}why: {self.why}",
            f"{indent}fix: {'; '.join(way for way in ways_out if way)}",
        ]


class SettingsError(ValueError):
    """Settings are unknown, of the wrong type or out of range; the message names every key and the fix."""

    def __init__(self, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings


def written(value: Any) -> str:
    """A value as in an override: null, true, and no quotes around a word."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def errors(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that stop a run."""
    return [finding for finding in findings if finding.severity == "error"]


def warnings(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that do not."""
    return [finding for finding in findings if finding.severity == "warning"]


def listed(findings: Sequence[Finding]) -> str:
    """All findings, numbered."""
    return "\n".join("\n".join([f"{n}. {f.lines()[0]}", *f.lines()[1:]]) for n, f in enumerate(findings, 1))


def render_errors(findings: Sequence[Finding], declared: str = "") -> str:
    """One message for all errors among ``findings``.

    Args:
        declared: the pair of dtypes that the settings are held against, for the headline.
    """
    found = errors(findings)
    settings = "1 setting contradicts" if len(found) == 1 else f"{len(found)} settings contradict"
    headline = f"verl_fp16: {settings} the precision flag{f' ({declared})' if declared else ''}. Nothing was started."
    return f"{headline}\n\n{listed(found)}\n"


def render_warnings(findings: Sequence[Finding]) -> str:
    """One message for all warnings among ``findings``; empty without any."""
    found = warnings(findings)
    return (
        f"verl_fp16: {len(found)} warning{'s'[: len(found) > 1]}; the run goes on.\n{listed(found)}\n" if found else ""
    )
