"""Whether a run with the flag would start here, and what to do if not.

* :mod:`~verl_fp16.doctor.host` and :mod:`~verl_fp16.doctor.packages` read facts, importing nothing heavy.
* :mod:`~verl_fp16.doctor.probe` runs in child processes and a Ray worker and reports what is really in place there.
* :mod:`~verl_fp16.doctor.checks` judges facts: pure functions that return :class:`~verl_fp16.doctor.check.Check`.
* :mod:`~verl_fp16.doctor.examination` puts the three together.
"""
