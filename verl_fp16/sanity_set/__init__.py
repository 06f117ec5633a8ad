"""The paper's sanity test: a data set that a stable algorithm must solve, made of questions that a model answers right
sometimes (Qi et al., arXiv 2510.26788: of 40 answers, 20% to 80%).

:mod:`.questions` reads verl's data, :mod:`.reward` loads the user's reward function, :mod:`.progress` keeps what was
counted over an interruption, :mod:`.selection` decides and writes. :mod:`verl_fp16.sampling` samples through vLLM.
"""
