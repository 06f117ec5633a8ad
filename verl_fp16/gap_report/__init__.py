"""The paper's mismatch figure for a model of one's own: the same tokens by rollout and by training, in one or several
precisions (Qi et al., arXiv 2510.26788, figure 2).

:mod:`.pairs` names what is compared, :mod:`.analysis` makes numbers with intervals of it, :mod:`.figure` draws it.
"""
