"""Measuring a causal language model: perplexity of a text, a greedy continuation, and the speed of both."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ._progress import progress_bar, tracked

PERPLEXITY_PROTOCOL = (
    "first max_tokens tokens of the text without special tokens, cut into non-overlapping windows of seq_len; each "
    "window is scored alone, all its tokens but the first; perplexity = exp(mean negative log-likelihood) in float32"
)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, with what it was measured on."""

    perplexity: float
    nll: float  # mean negative log-likelihood of a token, natural logarithm
    scored_tokens: int
    windows: int
    seq_len: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.scored_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation of a prompt."""

    text: str
    tokens: list[int]
    decode_tokens_per_second: float | None  # after the first token, prefill excluded; None for fewer than two tokens
    seconds: float


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids [T] of a text, without special tokens. Long texts are fine: nothing is run through a model here."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


@torch.inference_mode()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    seq_len: int = 512,
    max_tokens: int = 4096,
    description: str = "Perplexity",
    progress: bool = False,
) -> Perplexity:
    """Perplexity of `text` under PERPLEXITY_PROTOCOL. A last window of fewer than two tokens is dropped."""
    if seq_len < 2:
        raise ValueError(f"perplexity: seq_len: expected at least 2, got {seq_len}")
    tokens = encode(tokenizer, text)[:max_tokens]
    windows = [window for window in tokens.split(seq_len) if window.numel() >= 2]
    if not windows:
        raise ValueError(f"perplexity: text: expected at least 2 tokens, got {tokens.numel()}")
    device = next(model.parameters()).device
    total, scored = 0.0, 0
    start = time.perf_counter()
    for window in tracked(windows, description, progress):
        ids = window.to(device).unsqueeze(0)
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError(
                "perplexity: the model's logits are not finite: its weights or activations overflow its dtype"
            )
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        scored += window.numel() - 1
    nll = total / scored
    seconds = time.perf_counter() - start
    return Perplexity(math.exp(min(nll, 700.0)), nll, scored, len(windows), seq_len, seconds)


class _Clock:
    """A streamer for `generate` that only notes when each token arrives; the prompt arrives first."""

    def __init__(self, advance: Any) -> None:
        self.times: list[float] = []
        self._advance = advance

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self._advance()

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    stop_at_end: bool = True,
    chat: bool = False,
    description: str = "Generating",
    progress: bool = False,
) -> Continuation:
    """Greedy continuation with a key-value cache. `stop_at_end=False` always makes `max_new_tokens` tokens, for
    timing."""
    device = next(model.parameters()).device
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = encode(tokenizer, prompt).to(device).unsqueeze(0)
    if ids.numel() == 0:
        raise ValueError("generate: prompt: expected some text, got an empty prompt")
    ending = tokenizer.eos_token_id if stop_at_end else None
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with progress_bar(description, max_new_tokens, progress) as advance:
        clock = _Clock(advance)
        start = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            min_new_tokens=None if stop_at_end else max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=ending,
            pad_token_id=padding,
            streamer=clock,
        )
        seconds = time.perf_counter() - start
    tokens = made[0, ids.shape[1] :].tolist()
    arrivals = clock.times[1:]
    speed = None
    if len(arrivals) > 1 and arrivals[-1] > arrivals[0]:
        speed = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    return Continuation(tokenizer.decode(tokens, skip_special_tokens=True), tokens, speed, seconds)
