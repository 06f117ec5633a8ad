"""A report on runs, from the log files that they leave: what was learned, how far rollout and training were apart, and
where it went wrong. Imports neither verl nor torch."""
