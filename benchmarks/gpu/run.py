"""What FP16 costs and gains on a GPU: rollout, log-prob pass, update, weight sync and statistics of the gap.

    python benchmarks/gpu/run.py [--model PATH] [--output FILE] [--only rollout,log_prob,update,sync,metrics]

FP16 against BF16 (of the rollout FP32 too), side by side in alternated turns; given are medians and quartiles, of the
figures and of the ratios of neighbours, and the most memory. Each part is a process of its own. One that fails is
recorded with its reason, the others go on, and the exit code is 1; wrong input is 2.

The result goes to benchmarks/results/gpu-<name of the GPU>.json. With --only, the other parts that are in that file
stay there if they were measured on the same GPU, driver, versions, commit and model. ``--device cpu --tiny`` runs
everything on a CPU with a tiny model, to see that it runs; its result goes to outputs/gpu-rehearsal.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from facts import make_model, model_facts, slug, where  # noqa: E402
from measure import TINY, Settings  # noqa: E402

from verl_fp16.run_log import telling_lines  # noqa: E402
from verl_fp16.supervise import run_supervised  # noqa: E402

PARTS = ("rollout", "log_prob", "update", "sync", "metrics")
RESULTS = ROOT / "benchmarks" / "results"
WHERE = ("gpu", "driver", "versions", "commit", "model")
PART_TIMEOUT_S = 3600


class WrongInput(Exception):
    """One line that names the thing and the fix."""


def measure_part(name: str, settings: Settings) -> dict[str, Any]:
    """What a part measures, in this process."""
    if name in ("log_prob", "update"):
        import engine_parts

        return getattr(engine_parts, name)(settings)
    if name == "rollout":
        from rollout_part import rollout as part
    elif name == "sync":
        from sync_part import sync as part
    else:
        from metrics_part import metrics as part
    return part(settings)


def run_part(name: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """What the part's process found, or ``{"failed": reason}``. Nothing that it started is left."""
    into, log = folder / f"{name}.json", folder / f"{name}.log"
    given = folder / f"{name}-settings.json"
    given.write_text(json.dumps(asdict(settings)))
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--settings", str(given)]
    result = run_supervised(
        [*command, "--into", str(into)],
        log_path=log,
        env=_environment(settings.device),
        timeout_s=PART_TIMEOUT_S,
        critical=(),  # a part ends vLLM's engines itself
    )
    if result.ok and into.exists():
        return json.loads(into.read_text()) | {"date": date.today().isoformat()}
    if result.returncode is None or result.returncode < 0:
        return {"failed": (result.cause or "it left no result").partition("\n")[0]}
    return {"failed": _reason(log, result.returncode)}


def _environment(device: str) -> dict[str, str]:
    paths = (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The parts use the GPU before vLLM does, which rules out forks.
    environment.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if device == "cpu":
        environment |= {"VERL_PLATFORM": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    return environment


def _reason(log: Path, code: int) -> str:
    """The first line of the log that tells of an error, which is the reason, and the last, which ended the part."""
    return f"exit code {code}: {' ... '.join(telling_lines(log, 2)) or 'it said nothing'}"


def failures(parts: dict[str, Any]) -> list[str]:
    """Parts, and sides of parts, that have no figures."""
    found = [name for name, part in parts.items() if "failed" in part]
    for name, part in parts.items():
        found += [f"{name} ({side})" for side, row in part.get("sides", {}).items() if "failed" in row]
    return found


def parts_to_keep(output: Path, head: dict[str, Any], measured: tuple[str, ...]) -> dict[str, Any]:
    """Parts of an earlier result in the same place that are not measured anew.

    Raises:
        WrongInput: they were measured elsewhere, or the file is not ours.
    """
    if not output.exists() or set(measured) == set(PARTS):
        return {}
    try:
        earlier = json.loads(output.read_text())
        parts = {name: earlier["parts"][name] for name in earlier["parts"] if name not in measured}
        other = [key for key in WHERE if earlier[key] != head[key]]
    except (ValueError, KeyError, TypeError):
        raise WrongInput(f"{output} is no result of this benchmark: name another file with --output") from None
    if parts and other:
        raise WrongInput(
            f"{output} has parts of another {' and '.join(other)}, which --only would leave beside new ones: name "
            "another file with --output, or measure all parts"
        )
    return parts


def settings_of(options: argparse.Namespace, model: Path) -> Settings:
    settings = Settings(str(model), options.device, options.pairs or (2 if options.tiny else 10))
    return replace(settings, **TINY) if options.tiny else settings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face model; a random Qwen3 without it")
    parser.add_argument("--layers", type=int, help="of the random model; 32, tiny 2")
    parser.add_argument("--hidden", type=int, help="its width, a multiple of 128; 1024, tiny 128")
    parser.add_argument("--output", type=Path, help="the result's file")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--pairs", type=int, help="rounds in which every side has a turn; 10, tiny 2")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little work: to see that it runs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> tuple[str, ...]:
    """The parts to measure.

    Raises:
        WrongInput: an option that cannot be followed.
    """
    parts = tuple(dict.fromkeys(filter(None, options.only.split(","))))
    unknown = [name for name in parts if name not in PARTS]
    if unknown or not parts:
        raise WrongInput(f"--only: {', '.join(unknown) or 'nothing'} is no part: name some of {','.join(PARTS)}")
    if options.pairs is not None and options.pairs < 2:
        raise WrongInput(f"--pairs {options.pairs}: quartiles need 2 at least")
    if options.model and not (options.model / "config.json").is_file():
        raise WrongInput(f"--model {options.model}: no folder of a Hugging Face model, it has no config.json")
    if options.model and (options.layers or options.hidden):
        raise WrongInput("--layers and --hidden are of the random model: leave them or --model out")
    if options.layers is not None and options.layers < 1:
        raise WrongInput(f"--layers {options.layers}: 1 at least")
    if options.hidden is not None and (options.hidden < 128 or options.hidden % 128):
        raise WrongInput(f"--hidden {options.hidden}: a multiple of 128 is needed")
    if options.device == "cpu" and options.output and RESULTS in options.output.resolve().parents:
        raise WrongInput(f"--output {options.output}: what a CPU gives is no result: name a file elsewhere")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise WrongInput("torch sees no GPU here: --device cpu --tiny runs everything on a CPU")
    return parts


def measure(options: argparse.Namespace, names: tuple[str, ...]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.model
        if model is None:
            model = folder / "model"
            layers, hidden = options.layers or (2 if options.tiny else 32), options.hidden
            hidden = hidden or (128 if options.tiny else 1024)
            make_model(model, layers, hidden, **({"vocabulary": None} if options.tiny else {}))
        head = {
            **where(options.device),
            "date": date.today().isoformat(),
            "model": model_facts(model) | {"name": options.model.name if options.model else "random"},
        }
        default = RESULTS / f"gpu-{slug(head['gpu'])}.json"
        output = options.output or (ROOT / "outputs" / "gpu-rehearsal.json" if options.device == "cpu" else default)
        parts = parts_to_keep(output, head, names)
        settings = settings_of(options, model.resolve())
        for name in names:
            print(f"[{name}] ...", flush=True)
            parts[name] = run_part(name, settings, folder)
            print(f"[{name}] {line_of(parts[name])}", flush=True)
            # After each part: what is there is not lost with what follows.
            output.parent.mkdir(parents=True, exist_ok=True)
            ordered = {part: parts[part] for part in PARTS if part in parts}
            output.write_text(json.dumps({**head, "parts": ordered}, indent=2) + "\n")
    print(f"written to {output}")
    failed = failures({name: parts[name] for name in names})
    if failed:
        print(f"without figures: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def line_of(part: dict[str, Any]) -> str:
    """A part in one line."""
    if "failed" in part:
        return f"failed: {part['failed']}"
    figures = [
        f"{name} {side['median']:.4g} {part['unit']}" for name, side in part["sides"].items() if "median" in side
    ]
    ratios = [f"{name} {row['median']:.3f}" for name, row in part["ratios"].items()]
    return "; ".join([*figures, *ratios])


def main() -> int:
    options = parse()
    if options.part:
        settings = Settings(**json.loads(options.settings.read_text()))
        options.into.write_text(json.dumps(measure_part(options.part, settings)))
        return 0
    try:
        return measure(options, check(options))
    except WrongInput as error:
        print(f"benchmarks/gpu/run.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
