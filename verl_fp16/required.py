"""Imported by verl in every worker when the flag is given, through ``model.external_lib``.

verl imports the modules that ``model.external_lib`` names wherever it builds a model configuration: in FSDP workers and
in vLLM's server. An import that fails stops the worker, so a node without this package, or a process in which the hooks
are not in place, cannot train in something else than what the flag declared.
"""

from verl_fp16 import plugin

plugin.require_active()
# A process that was handed a resolved configuration has not resolved the flag itself.
plugin.flag_given = True
