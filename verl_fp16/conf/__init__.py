"""Hydra configuration groups of verl_fp16: ``precision`` (the flag) and ``hardware``."""
