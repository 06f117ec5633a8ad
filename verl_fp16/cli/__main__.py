"""``python -m verl_fp16.cli``: the same as ``verl-fp16``."""

from verl_fp16.cli.app import app

app(prog_name="verl-fp16")
