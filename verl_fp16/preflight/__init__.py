"""What FP16 would do to a model, before anything is trained.

* :mod:`~verl_fp16.preflight.place` finds what was named.
* :mod:`~verl_fp16.preflight.shards` finds a model's safetensors, refuses what cannot be judged.
* :mod:`~verl_fp16.preflight.tensor_files` reads the values in pieces.
* :mod:`~verl_fp16.preflight.refusals` has the words for what cannot be judged.
* :mod:`~verl_fp16.preflight.weights` examines a tensor: what the cast to FP16 does to its values.
* :mod:`~verl_fp16.preflight.verdict` judges the weights: FIT, AT RISK or UNFIT, each with its reasons.

And the model run on prompts:

* :mod:`~verl_fp16.preflight.sequences` makes the tokens, of prompts or generated.
* :mod:`~verl_fp16.preflight.stored_weights` finds the model's parameters in the shards and reads them in pieces.
* :mod:`~verl_fp16.preflight.streamed_model` builds the model and has weights in memory only while they are used.
* :mod:`~verl_fp16.preflight.activations` looks at what each module gives, and at the gradients.
* :mod:`~verl_fp16.preflight.loss_scale_search` finds the largest loss scale that does not overflow.
* :mod:`~verl_fp16.preflight.passes` makes the passes; :mod:`~verl_fp16.preflight.run` puts all of it together.
* :mod:`~verl_fp16.preflight.run_verdict` judges both halves.
"""
