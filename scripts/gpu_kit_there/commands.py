"""The command line of :mod:`gpu_kit_there`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import gpu_kit_there
from gpu_kit_there.common import KitError, exit_code
from gpu_kit_there.installation import install
from gpu_kit_there.pieces import collect, join, status


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="gpu_kit_there.pyz", description=gpu_kit_there.__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    texts = {
        "collect": "copy the pieces that arrived into the kit's folder",
        "status": "what is there and what is missing",
        "join": "write the wheels and check each",
        "install": "install the wheels beside the torch that is here",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "collect":
            command.add_argument("sources", nargs="+", type=Path, metavar="FROM", help="files or folders that arrived")
        command.add_argument("--kit", type=Path, required=True, metavar="DIR", help="the kit's folder on this machine")
        if name == "install":
            text = "a venv that sees the packages of this Python, or this Python itself"
            command.add_argument("--target", choices=("venv", "running"), default="venv", help=text)
            command.add_argument("--venv", type=Path, metavar="DIR", help="where the venv goes [KIT/venv]")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return exit_code(lambda: _run(given), given.kit, "the same command goes on where this one stopped")


def _run(given: argparse.Namespace) -> int:
    if given.command == "collect":
        return collect(given.sources, given.kit)
    if given.command == "install":
        if given.venv and given.target == "running":
            raise KitError("--venv has no effect with --target running: leave one of them out")
        return install(given.kit, given.target, given.venv)
    return {"status": status, "join": join}[given.command](given.kit)
