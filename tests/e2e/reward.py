"""A reward that a random model meets half of the time, so that there is something to learn from the first step."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(sum(solution_str.encode()) % 2)
