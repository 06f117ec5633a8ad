"""What really runs: asked of every process before the first validation or rollout, and held against the declaration.

* :mod:`~verl_fp16.readback.rank` is what one process says of itself, read from live objects, not from configurations.
* :mod:`~verl_fp16.readback.gather` asks every training rank and every rollout worker, through Ray.
* :mod:`~verl_fp16.readback.compare` finds the differences (plain Python).
* :mod:`~verl_fp16.readback.table` prints one table and writes one file.
"""
