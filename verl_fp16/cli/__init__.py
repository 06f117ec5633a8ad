"""``verl-fp16``: one module for each command; :mod:`verl_fp16.cli.app` puts them together.

``verl-fp16 --help`` imports neither torch nor verl nor Ray: a command imports what it needs when it runs.
"""
