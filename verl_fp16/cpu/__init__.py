"""verl, FSDP and vLLM's CPU build on a machine without a GPU.

This room stands alone: it is active only where it is chosen (``trainer.device=cpu``, which puts ``VERL_PLATFORM=cpu``
into the processes of a run) and needs none of the FP16 hooks, so plain verl on a CPU can be the control of a test.

* :mod:`~verl_fp16.cpu.choice` reads and makes the choice.
* :mod:`~verl_fp16.cpu.device` is what verl calls on ``torch.cuda``; :mod:`~verl_fp16.cpu.platform` is verl's platform
  ``cpu`` (0.9 and later).
* :mod:`~verl_fp16.cpu.hooks` declares what verl, torch and vLLM need besides; :mod:`~verl_fp16.cpu.wrappers` does it.
* :mod:`~verl_fp16.cpu.autocast` makes CPU autocast keep softmax, log-softmax and logsumexp in FP32, as CUDA's does.
* :mod:`~verl_fp16.cpu.distribution` lets vLLM's CPU build be found under the name ``vllm``.
"""
