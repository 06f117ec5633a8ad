"""The paper's mismatch figure for a model of one's own: the same tokens by rollout and by training, in one or several
precisions (Qi et al., arXiv 2510.26788, figure 2).

:mod:`.sides` names what is compared, :mod:`.driver` runs each :mod:`.stage` in a process and :mod:`.folder` keeps what
it makes; :mod:`.results` puts that together, :mod:`.analysis` makes numbers with intervals of it, :mod:`.figure` draws
it. :mod:`.from_run` takes what a run has written instead.
"""
