"""What the plugin adds to ``import verl``: medians over fresh processes, beside the import itself.

    python benchmarks/import_time.py [--runs 15]

In each process verl is imported without plugins (``VERL_USE_EXTERNAL_PLUGINS=none``), timed; then the modules that the
entry points name are imported as verl would import them, timed. Bytecode may be cached, as pip leaves it: where
``PYTHONDONTWRITEBYTECODE`` is set, a checkout would be compiled anew in every process, which no installation is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

_CHILD = """
import time
t0 = time.perf_counter()
import verl
t1 = time.perf_counter()
import verl_fp16.plugin, verl_fp16.cpu.plugin
t2 = time.perf_counter()
import json
print(json.dumps([t1 - t0, t2 - t1]))
"""


def measure(runs: int) -> tuple[float, float]:
    """Median seconds of ``import verl`` and of the plugin, over ``runs`` processes after one to warm the disk cache."""
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    samples = []
    for _ in range(runs + 1):
        output = subprocess.run([sys.executable, "-c", _CHILD], env=env, capture_output=True, text=True, check=True)
        samples.append(json.loads(output.stdout.splitlines()[-1]))
    verl, plugin = (statistics.median(column) for column in zip(*samples[1:], strict=True))
    return verl, plugin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    seconds, added = measure(parser.parse_args().runs)
    print(f"import verl {seconds * 1e3:.0f} ms, plugin {added * 1e3:.1f} ms, ratio {added / seconds:.4f}")
