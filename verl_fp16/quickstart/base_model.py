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
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from verl_fp16.quickstart.task import DATA_SOURCE, Sum, compute_score, split_sums
from verl_fp16.quickstart.tokenizer import build_tokenizer

GIVE_UP = "?"
# Three digits and the end token fill four tokens; one more lets an answer that is too long be seen as wrong.
MAX_ANSWER_TOKENS = 5
ACCURACY_SAMPLES = 4
_IGNORED = -100


@dataclass(frozen=True)
class BaseRecipe:
    """How the base model is trained; the defaults leave it right on about a third of its sampled answers.

    Attributes:
        sum_steps: Optimizer steps on sums alone.
        give_up_steps: Further steps in which ``give_up_share`` of the loss asks for ``?``.
        give_up_share: Share of questions on which the model learns to give up, in 0 .. 1 (exclusive).
        batch_size: Questions a step.
        learning_rate: Peak of AdamW's learning rate; it warms up linearly over ``warmup_steps`` and decays along a
            cosine to a tenth at the last step.
        warmup_steps: Length of the warm-up.
        accuracy_window: Lowest and highest sampled held-out accuracy that is accepted.
        extra_steps: Steps added, at the final learning rate, each time the accuracy is outside of the window.
        max_extra_steps: Bound on the steps added in all; beyond it training fails.
    """

    sum_steps: int = 420
    give_up_steps: int = 120
    give_up_share: float = 0.55
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    accuracy_window: tuple[float, float] = (0.20, 0.60)
    extra_steps: int = 40
    max_extra_steps: int = 240


@dataclass(frozen=True)
class BaseModelReport:
    """What `train_base_model` did.

    Attributes:
        steps: Optimizer steps taken, extra steps included.
        seconds: Wall-clock time of training and evaluation.
        parameters: Number of parameters.
        sampled_accuracy: Share of right answers on the held-out questions, sampled at temperature 1.
        greedy_accuracy: The same with greedy decoding.
    """

    steps: int
    seconds: float
    parameters: int
    sampled_accuracy: float
    greedy_accuracy: float


class BaseAccuracyError(RuntimeError):
    """The trained base model is outside of the accuracy window, so a GRPO run from it would show nothing."""


def base_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """The architecture: Qwen3 with 2 layers and 1.3 M parameters, untied embeddings, FP32 weights."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        # Sequences are about ten tokens long: with the usual base of 10,000 most rotary frequencies cannot tell
        # their positions apart, and digit alignment is learned in twice the steps.
        rope_parameters={"rope_type": "default", "rope_theta": 30.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
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
    prompt_ids = _prompt_ids(tokenizer, prompts)
    for index, ids in enumerate(prompt_ids):
        by_length.setdefault(len(ids), []).append(index)
    answers = [""] * len(prompts)
    for length in sorted(by_length):
        indices = by_length[length]
        step_input = torch.tensor([prompt_ids[index] for index in indices])
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
    recipe: BaseRecipe = BaseRecipe(),
    threads: int = 1,
) -> BaseModelReport:
    """Train the base model and save it, with tokenizer and generation config, as a Hugging Face folder in FP32.

    Deterministic for a seed on one machine. torch's global random state is left as it was.

    Args:
        output_dir: Folder for the model; created if missing. No weights are written when training fails.
        seed: Decides the held-out pairs (`split_sums`), the initial weights and the order of the data.
        progress: Called after each step with the step (from 1), the planned number of steps and the loss.
        recipe: Length and mixture of the training.
        threads: torch threads meanwhile. One is nearly as fast as two on matrices this small, and does not stall when
            other work shares the cores.

    Raises:
        BaseAccuracyError: If the sampled held-out accuracy is outside of ``recipe.accuracy_window`` after
            ``recipe.max_extra_steps`` more steps; the message gives the accuracy and what to change.
    """
    start = time.perf_counter()
    tokenizer = build_tokenizer(output_dir)
    split = split_sums(seed)
    planned = recipe.sum_steps + recipe.give_up_steps
    lowest, highest = recipe.accuracy_window
    with _torch_threads(threads):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(base_config(tokenizer))
        trainer = _Trainer(model, tokenizer, split.train, recipe, seed)
        step = 0
        while True:
            goal = planned if step == 0 else step + recipe.extra_steps
            while step < goal:
                loss = trainer.step(step)
                step += 1
                if progress is not None:
                    progress(step, goal, loss)
            sampled = accuracy(model, tokenizer, split.held_out, seed=seed)
            if lowest <= sampled <= highest:
                break
            if recipe.extra_steps < 1 or step + recipe.extra_steps > planned + recipe.max_extra_steps:
                raise BaseAccuracyError(_advice(sampled, step, recipe))
        greedy = accuracy(model, tokenizer, split.held_out, temperature=0.0)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(str(output_dir), safe_serialization=True)
    return BaseModelReport(
        steps=step,
        seconds=time.perf_counter() - start,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sampled_accuracy=sampled,
        greedy_accuracy=greedy,
    )


class _Trainer:
    """One optimizer and the encoded training questions; `step` makes one update."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sums: Sequence[Sum],
        recipe: BaseRecipe,
        seed: int,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
        prompts = _prompt_ids(tokenizer, [item.question for item in sums])
        self.answered = _encode(tokenizer, prompts, [item.answer for item in sums])
        self.given_up = _encode(tokenizer, prompts, [GIVE_UP] * len(sums))

    def step(self, step: int) -> float:
        recipe = self.recipe
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
            group["lr"] = self._learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def _loss(self, token_ids: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of a whole answer, averaged over the rows of (rows, length) ids and labels."""
        logits = self.model(input_ids=token_ids, use_cache=False).logits
        total = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        return total / len(token_ids)

    def _learning_rate(self, step: int) -> float:
        planned = self.recipe.sum_steps + self.recipe.give_up_steps
        warmup = min(1.0, (step + 1) / max(1, self.recipe.warmup_steps))
        cosine = 0.5 * (1 + cos(pi * min(1.0, step / max(1, planned))))
        return self.recipe.learning_rate * warmup * (0.1 + 0.9 * cosine)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Right-padded inputs and next-token labels, both int64 (rows, length); only answer tokens are labelled.

    Padding follows the labelled tokens, so causal attention alone keeps it out of the loss.
    """
    targets = [ids + [tokenizer.eos_token_id] for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
    length = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)) - 1
    inputs = torch.full((len(prompts), length), tokenizer.pad_token_id)
    labels = torch.full((len(prompts), length), _IGNORED)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        ids = [*prompt, *target[:-1]]
        inputs[row, : len(ids)] = torch.tensor(ids)
        labels[row, len(prompt) - 1 : len(ids)] = torch.tensor(target)
    return inputs, labels


def _advice(measured: float, steps: int, recipe: BaseRecipe) -> str:
    lowest, highest = recipe.accuracy_window
    remedy = (
        "train longer (BaseRecipe.sum_steps) or lower BaseRecipe.give_up_share"
        if measured < lowest
        else "raise BaseRecipe.give_up_share or give_up_steps"
    )
    return (
        f"the base model's sampled held-out accuracy is {measured:.3f} after {steps} steps, outside of "
        f"{lowest:.2f}-{highest:.2f}, so GRPO would have too little to learn from or to gain: {remedy}, "
        "or take another seed"
    )


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
