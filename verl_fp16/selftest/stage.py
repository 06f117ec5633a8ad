"""One stage in a process of its own: ``python -m verl_fp16.selftest.stage NAME SPEC.json FACTS.json``."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from verl_fp16.whole_files import write_whole

MODULES = {
    "doctor": "doctor_stage",
    "model": "model_stage",
    "engine": "engine_stage",
    "run": "run_stage",
    "gap": "gap_stage",
}
"""Stage -> the module here whose ``run(spec, tell)`` returns its facts; what it tells goes to spec["progress"]."""


def main(name: str, spec_file: str, facts_file: str) -> int:
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))

    def tell(what: str) -> None:
        print(what, flush=True)
        write_whole(Path(spec["progress"]), what.encode())

    facts = importlib.import_module(f"verl_fp16.selftest.{MODULES[name]}").run(spec, tell)
    write_whole(Path(facts_file), json.dumps(facts).encode())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
