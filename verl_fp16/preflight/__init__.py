"""What FP16 would do to a model, before anything is trained.

* :mod:`~verl_fp16.preflight.place` finds what was named.
* :mod:`~verl_fp16.preflight.shards` finds a model's safetensors, refuses what cannot be judged, and reads in pieces.
* :mod:`~verl_fp16.preflight.refusals` has the words for what cannot be judged.
* :mod:`~verl_fp16.preflight.weights` examines a tensor: what the cast to FP16 does to its values.
* :mod:`~verl_fp16.preflight.verdict` judges what was found: FIT, AT RISK or UNFIT, each with its reasons.
"""
