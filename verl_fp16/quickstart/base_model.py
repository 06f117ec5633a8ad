"""Supervised training of the small base model from which the quickstart's GRPO run starts.

Reinforcement learning can only raise what a model sometimes does already, and it sharpens arithmetic slowly. The base
model is therefore taught sums first and then to give up (answer ``?``) on about half of all questions: its sampled
accuracy is low although it can add, and a GRPO run learns to choose within tens of steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from verl_fp16.quickstart.task import DATA_SOURCE, Sum, compute_score, split_sums
from verl_fp16.quickstart.tokenizer import IGNORED_LABEL, build_tokenizer, encode_answers, prompt_ids

GIVE_UP = "?"
# Three digits and the end token fill four tokens; one more lets an answer that is too long be seen as wrong.
MAX_ANSWER_TOKENS = 5
ACCURACY_SAMPLES = 4


@dataclass(frozen=True)
class BaseRecipe:
    """How the base model is trained; the defaults leave it right on about a third of its sampled answers.

    Attributes:
        sum_steps: Optimizer steps on sums alone.
        give_up_steps: Further steps in which the model learns to give up on ``give_up_share`` of the questions.
        batch_size: Questions a step.
        learning_rate: AdamW's, after a linear rise over ``warmup_steps``; a cosine takes it to a tenth at the end.
        accuracy_window: Lowest and highest sampled held-out accuracy that is accepted.
        extra_steps: Steps of the second kind added, at the final learning rate, while the accuracy is outside.
        max_extra_steps: Bound on the steps added in all.
        experts: Experts of each layer, of which a token takes two; 0 for a dense model.
        head_dim: Of an attention head, a divisor of 256: 64 where a GPU's attention kernels take no smaller one.
    """

    sum_steps: int = 300
    give_up_steps: int = 100
    give_up_share: float = 0.55
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    accuracy_window: tuple[float, float] = (0.20, 0.60)
    extra_steps: int = 40
    max_extra_steps: int = 240
    experts: int = 0
    head_dim: int = 32


@dataclass(frozen=True)
class BaseModelReport:
    """What `train_base_model` did: optimizer steps with extra ones, wall-clock seconds with evaluation, the number of
    parameters, and the share of right answers on the held-out questions (0 .. 1), sampled at temperature 1 and greedy.
    """

    steps: int
    seconds: float
    parameters: int
    sampled_accuracy: float
    greedy_accuracy: float


class BaseAccuracyError(RuntimeError):
    """The trained base model is outside of the accuracy window, so a GRPO run from it would show nothing."""


def base_config(
    tokenizer: PreTrainedTokenizerBase, experts: int = 0, head_dim: int = 32
) -> Qwen3Config | Qwen3MoeConfig:
    """The architecture: Qwen3 with 2 layers and 1.3 M parameters, untied embeddings, FP32 weights.

    With ``experts`` each layer has so many of half its width, of which a token takes two.
    """
    architecture: type[Qwen3Config | Qwen3MoeConfig] = Qwen3Config
    mixture: dict[str, int | bool] = {}
    if experts:
        architecture = Qwen3MoeConfig
        mixture = {
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
        }
    return architecture(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=256 // head_dim,
        num_key_value_heads=128 // head_dim,
        head_dim=head_dim,
        # No weight depends on it; `make compare` has answers go on for longer than they would.
        max_position_embeddings=4096,
        # Sequences are about ten tokens long: with the usual base of 10,000 most rotary frequencies cannot tell their
        # positions apart, and the model learns far later which digits belong together.
        rope_parameters={"rope_type": "default", "rope_theta": 30.0},
        # Twice the usual spread: from 0.02, equally many steps end at about half of the accuracy.
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **mixture,
    )


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    temperature: float,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Answer each prompt once, by sampling from the full softmax or greedily.

    Args:
        model: A causal language model of transformers on the CPU.
        tokenizer: Its tokenizer; the chat template renders each prompt as one user message.
        prompts: Questions, for example ``12+7=``.
        temperature: Divides the logits; 0 takes the most likely token.
        max_new_tokens: Tokens after which an answer is cut, the end token included.
        generator: Source of randomness; torch's global one if None.

    Returns:
        The decoded answers without special tokens, in the order of ``prompts``.

    Raises:
        ValueError: If ``temperature`` is negative or ``max_new_tokens`` is not positive.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ValueError(f"need temperature >= 0 and max_new_tokens >= 1, got {temperature} and {max_new_tokens}")
    # Prompts of one length form a batch without padding, so that no position needs masking.
    by_length: dict[int, list[int]] = {}
    encoded = prompt_ids(tokenizer, prompts)
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    answers = [""] * len(prompts)
    for length in sorted(by_length):
        indices = by_length[length]
        step_input = torch.tensor([encoded[index] for index in indices])
        ended = torch.zeros(len(indices), dtype=torch.bool)
        cache = None
        tokens: list[Tensor] = []
        for _ in range(max_new_tokens):
            output = model(input_ids=step_input, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probabilities = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
            token = token.masked_fill(ended, tokenizer.pad_token_id)
            tokens.append(token)
            ended = ended | (token == tokenizer.eos_token_id)
            if ended.all():
                break
            step_input = token[:, None]
        texts = tokenizer.batch_decode(torch.stack(tokens, 1), skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            answers[index] = text
    return answers


def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sums: Sequence[Sum],
    *,
    temperature: float = 1.0,
    samples: int = ACCURACY_SAMPLES,
    seed: int = 0,
) -> float:
    """Share of right answers to ``sums``, in 0 .. 1, over ``samples`` answers a question (one when greedy)."""
    asked = list(sums) * (samples if temperature > 0 else 1)
    generator = torch.Generator().manual_seed(seed)
    answers = sample_answers(
        model, tokenizer, [item.question for item in asked], temperature, MAX_ANSWER_TOKENS, generator
    )
    scores = [compute_score(DATA_SOURCE, text, item.answer) for text, item in zip(answers, asked, strict=True)]
    return sum(scores) / len(scores)


def train_base_model(
    output_dir: str | Path,
    seed: int,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    recipe: BaseRecipe | None = None,
    threads: int = 1,
) -> BaseModelReport:
    """Train the base model and save it, with tokenizer and generation config, as a Hugging Face folder in FP32.

    Deterministic for a seed on one machine. torch's global random state is left as it was.

    Args:
        output_dir: Folder for the model; created if missing. No weights are written when training fails.
        seed: Decides the held-out pairs (`split_sums`), the initial weights and the order of the data.
        progress: Called after each step with the step (from 1), the planned number of steps and the loss.
        recipe: Length and mixture of the training.
        threads: torch threads meanwhile. Two gain a third on idle cores, but on cores that are shared with other work
            they wait for each other and can be many times slower than one.

    Raises:
        BaseAccuracyError: If the sampled held-out accuracy is outside of ``recipe.accuracy_window`` after
            ``recipe.max_extra_steps`` more steps; the message gives the accuracy and what to change.
    """
    start = time.perf_counter()
    recipe = recipe or BaseRecipe()
    tokenizer = build_tokenizer(output_dir)
    split = split_sums(seed)
    planned = recipe.sum_steps + recipe.give_up_steps
    lowest, highest = recipe.accuracy_window
    with _torch_threads(threads):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            architecture = Qwen3MoeForCausalLM if recipe.experts else Qwen3ForCausalLM
            model = architecture(base_config(tokenizer, recipe.experts, recipe.head_dim))
        trainer = _Trainer(model, tokenizer, split.train, seed)
        step, goal = 0, planned
        while True:
            while step < goal:
                loss = trainer.step(step, recipe)
                step += 1
                if progress is not None:
                    progress(step, goal, loss)
            sampled = accuracy(model, tokenizer, split.held_out, seed=seed)
            if lowest <= sampled <= highest:
                break
            goal += recipe.extra_steps
            if recipe.extra_steps < 1 or goal > planned + recipe.max_extra_steps:
                remedy = "train longer (sum_steps)" if sampled < lowest else "raise give_up_share or give_up_steps"
                raise BaseAccuracyError(
                    f"the base model's sampled held-out accuracy is {sampled:.3f} after {step} steps, outside of "
                    f"{lowest:.2f}-{highest:.2f}, so GRPO would have too little to learn from or to gain: {remedy} in "
                    "its BaseRecipe, or take another seed"
                )
        greedy = accuracy(model, tokenizer, split.held_out, temperature=0.0)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(str(output_dir))
    return BaseModelReport(
        steps=step,
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sampled_accuracy=sampled,
        greedy_accuracy=greedy,
    )


class _Trainer:
    """One optimizer and the encoded training questions; `step` makes one update."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sums: Sequence[Sum], seed: int):
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
        prompts = prompt_ids(tokenizer, [item.question for item in sums])
        self.answered = encode_answers(tokenizer, prompts, [item.answer for item in sums])
        self.given_up = encode_answers(tokenizer, prompts, [GIVE_UP] * len(sums))

    def step(self, step: int, recipe: BaseRecipe) -> float:
        rows = torch.randperm(len(self.answered[0]), generator=self.generator)[: recipe.batch_size]
        giving_up = 0
        share = 0.0
        if step >= recipe.sum_steps:
            # "?" is learned from few rows, so a quarter of the batch stands for its whole share by weight; a larger
            # part would take rows from the sums and cost accuracy.
            giving_up = max(1, recipe.batch_size // 4)
            share = recipe.give_up_share
        sums, labels = (part[rows[giving_up:]] for part in self.answered)
        loss = (1 - share) * self._loss(sums, labels)
        if giving_up:
            sums, labels = (part[rows[:giving_up]] for part in self.given_up)
            loss = loss + share * self._loss(sums, labels)
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def _loss(self, token_ids: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of a whole answer, averaged over the rows of (rows, length) ids and labels."""
        logits = self.model(input_ids=token_ids, use_cache=False).logits
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        return total / len(token_ids)


def _learning_rate(step: int, recipe: BaseRecipe) -> float:
    warmup = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    cosine = 0.5 * (1 + cos(pi * min(1.0, step / max(1, recipe.sum_steps + recipe.give_up_steps))))
    return recipe.learning_rate * warmup * (0.1 + 0.9 * cosine)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
