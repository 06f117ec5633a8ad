"""Stages of the self-test that do at once what a test asks for, in place of the real ones.

``SELFTEST_FAKE`` is a JSON object: stage -> ``hang``, ``crash: LINE``, ``die``, or facts in place of the samples'.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import selftest_samples


def main(name: str, spec_file: str, facts_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    Path(spec["output"], f"{name}.spec-seen").write_text(json.dumps({**spec, "platform": os.environ["VERL_PLATFORM"]}))
    asked = json.loads(os.environ.get("SELFTEST_FAKE", "{}")).get(name)
    Path(spec["progress"]).write_text("under way")
    if asked == "hang":
        Path(spec["output"], "hanging").write_text(str(os.getpid()))
        time.sleep(60)
    if asked == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(asked, str) and asked.startswith("crash: "):
        sys.exit(f"ValueError: {asked.removeprefix('crash: ')}")
    facts = asked if isinstance(asked, dict) else selftest_samples.ALL[name]()
    if name == "run" and asked is None:
        facts["gpus"] = selftest_samples.GPUS
    Path(facts_file).write_text(json.dumps(facts))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
