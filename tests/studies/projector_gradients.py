"""Real gradients for `projector_quality.py`: an encoder on SST-2, a decoder on WikiText-2, as they train."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
"""The gradient of each matrix of the blocks, (out, in) fp32, by the parameter's name."""

Batch = dict[str, Tensor]

OTHERS_FROM = 1_000_000
"""Batches from this number on are drawn like the others, and never trained on."""
RECENT = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    name: str
    model: nn.Module
    batch: Callable[[int], Batch]
    """The batch of a number, always the same one."""
    learning_rate: float
    stages: tuple[int, ...]
    """Training steps after which projectors are made and judged."""
    layers: tuple[int, ...]


def encoder_on_sst2(folder: Path, data: Path, device: str) -> Source:
    """MiniLM-L6 with a new head for two classes, batches of 16 sentences of at most 64 tokens."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line.rsplit("\t", 1) for line in (data / "train.tsv").read_text().splitlines() if "\t" in line]

    def batch(number: int) -> Batch:
        drawn = torch.randint(len(lines), (16,), generator=torch.Generator().manual_seed(number))
        rows = [lines[index] for index in drawn.tolist()]
        tokens = tokenizer(
            [row[0] for row in rows],
            padding="max_length",
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        labels = torch.tensor([int(row[1]) for row in rows])
        return {name: each.to(device) for name, each in {**tokens, "labels": labels}.items()}

    return Source(
        name="MiniLM-L6, SST-2", model=model.to(device), batch=batch, learning_rate=5e-5, stages=(0, 150),
        layers=(0, 2, 5),
    )  # fmt: skip


def decoder_on_wikitext(data: Path, device: str, layers: int = 4, hidden: int = 256) -> Source:
    """A Llama trained from scratch on bytes, batches of 8 x 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=43 * hidden // 16, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    text = b"".join((data / f"{part}.txt").read_bytes() for part in ("test", "valid"))
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def batch(number: int) -> Batch:
        first = torch.randint(len(stream) - 128, (8,), generator=torch.Generator().manual_seed(number))
        ids = stream[first[:, None] + torch.arange(128)].long().to(device)
        return {"input_ids": ids, "labels": ids}

    return Source(
        name=f"Llama {layers} x {hidden}, WikiText-2", model=LlamaForCausalLM(config).to(device), batch=batch,
        learning_rate=1e-3, stages=(0, 300, 800),
        layers=tuple(range(layers)),
    )  # fmt: skip


class Training:
    """AdamW on all parameters, with 50 steps of warm-up, and gradients on the way."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.steps = 0
        self.loss = math.nan
        """Of the last batch looked at."""
        self.recent: deque[Gradients] = deque(maxlen=RECENT)
        """Gradients of the last steps, each at the weights of its step."""
        self._matrices = {
            name: parameter
            for name, parameter in source.model.named_parameters()
            if parameter.ndim == 2 and (found := re.search(r"layers?\.(\d+)\.", name))
            if int(found[1]) in source.layers
        }
        self._adam = torch.optim.AdamW(source.model.parameters(), lr=source.learning_rate, weight_decay=0.01)

    def step(self) -> Gradients:
        """Train on the next batch; its gradients."""
        gradients = self.gradients(self.steps)
        for group in self._adam.param_groups:
            group["lr"] = self.source.learning_rate * min(1.0, (self.steps + 1) / 50)
        self._adam.step()
        self.steps += 1
        self.recent.append(gradients)
        return gradients

    @torch.enable_grad()
    def gradients(self, number: int) -> Gradients:
        """Those of the batch of that number at the present weights."""
        self.source.model.zero_grad(set_to_none=True)
        loss = self.source.model(**self.source.batch(number)).loss
        loss.backward()
        self.loss = float(loss.detach())
        return {name: _gradient(parameter).clone() for name, parameter in self._matrices.items()}

    def others(self, count: int) -> tuple[list[Gradients], float]:
        """Of batches that are neither trained on nor calibrated with, other ones at each step; mean loss."""
        first = OTHERS_FROM + 100 * self.steps
        found, losses = [], []
        for number in range(first, first + count):
            found.append(self.gradients(number))
            losses.append(self.loss)
        return found, fmean(losses)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def total(gradients: list[Gradients]) -> Gradients:
    """The sum over batches."""
    return {name: torch.stack([each[name] for each in gradients]).sum(0) for name in gradients[0]}
