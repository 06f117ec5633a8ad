"""FP16 for verl: one flag for actor, reference policy, critic and vLLM rollout, with a loss scaler that can be trusted.

See :mod:`verl_fp16.plugin` for how it gets into verl, :mod:`verl_fp16.hooks` for every place of verl that it touches,
and the configuration group ``precision`` under ``verl_fp16/conf`` for the flag.
"""

__version__ = "0.1.0"
