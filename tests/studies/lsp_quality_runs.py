"""What `lsp_quality.py` trains: sources of data with a model to start from, methods, and one run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trained_models import sizes_of

from engines import load_engine
from engines.base import Batch, Context, StepStats
from engines.errors import NonFiniteLoss
from engines.settings.parse import parse_settings
from engines.shapes import Workload
from engines.transfer.clock import now_s

SEQ_LEN = 128
"""Bytes of a sequence of the decoder."""
WORDS = 64
"""Tokens of a sentence at most."""
HELD_OUT = 0.1
"""Share of a text that is judged and never trained on: its end."""
TRAINED = {"schedule": "linear", "weight_decay": 0.01}
"""Settings of every method. Warm-up is a twentieth of the run."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every run of a source gets."""

    batch_size: int
    steps: int
    start_steps: int = 0
    """AdamW steps that made the model that all runs start from."""
    eval_every: int
    check_every: int
    """Steps between checks of projectors."""
    learning_rates: tuple[float, ...]
    most_judged: int = 1_000_000
    """Sequences of the held-out data to judge on."""


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    d_share: float | None = None
    """d over the smaller dimension of a matrix of attention."""


METHODS = (
    Method(name="native", engine="native"),
    *(
        Method(name=f"lsp {kind} d=n/{part}", engine="lsp", settings={"projector": kind}, d_share=1 / part)
        for kind in ("block", "paper")
        for part in (4, 2)
    ),
    Method(name="lsp block d=3n/4", engine="lsp", settings={"projector": "block"}, d_share=0.75),
    Method(name="lsp block d=n", engine="lsp", settings={"projector": "block"}, d_share=1.0),
    *(
        Method(
            name=f"lsp block d=n/{part}, checked every 50 steps",
            engine="lsp",
            settings={"projector": "block", "check_every": 50},
            d_share=1 / part,
        )
        for part in (4, 2)
    ),
)
"""With d = n nothing is left out of a square matrix; what remains is Adam in a basis of its own. Checks every
50 steps tell what a subspace that follows the gradient closer is worth."""


@dataclass(kw_only=True)
class Source:
    """A model to start from, batches by number and seed, and batches to judge on."""

    name: str
    hidden: int
    model: Callable[[int], nn.Module]
    """A fresh one on the CPU in fp32; the seed is for what is not pretrained."""
    batch: Callable[[int, int], Batch]
    """Of a seed and a number, always the same one."""
    judged: list[Batch]
    budget: Budget


class Start:
    """An `engines.base.Blueprint` of a model that is there."""

    def __init__(self, reference: nn.Module) -> None:
        self._weights = {name: parameter.detach() for name, parameter in reference.named_parameters()}
        self.shape = sizes_of(reference)
        self.sample: Any = None
        buffers = {name: buffer.clone() for name, buffer in reference.named_buffers()}
        self.model: Any = copy.deepcopy(reference).to("meta")
        for name, buffer in buffers.items():
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._buffers[leaf] = buffer

    def fill(self, name: str, out: Tensor) -> None:
        out.copy_(self._weights[name])

    def release(self) -> None:
        self._weights = {}


def encoder_on_sst2(folder: Path, data: Path, budget: Budget) -> Source:
    """MiniLM-L6 with a new head for two classes. Judged on the development set."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the head is new, for each run
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rows(part: str) -> tuple[dict[str, Tensor], Tensor]:
        text = (data / f"{part}.tsv").read_text(encoding="utf-8")
        lines = [line.rsplit("\t", 1) for line in text.splitlines() if "\t" in line]
        tokens = tokenizer(
            [line[0] for line in lines],
            padding="max_length",
            truncation=True,
            max_length=WORDS,
            return_tensors="pt",
        )
        return dict(tokens), torch.tensor([int(line[1]) for line in lines])

    trained, labels = rows("train")
    dev, dev_labels = rows("dev")

    def taken(tokens: Mapping[str, Tensor], labels: Tensor, which: Tensor) -> Batch:
        return Batch(inputs={**{name: each[which] for name, each in tokens.items()}, "labels": labels[which]})

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            dtype=torch.float32,
        )

    def batch(seed: int, number: int) -> Batch:
        """Without replacement: each pass over the data in a new order."""
        per_pass = len(labels) // budget.batch_size
        generator = torch.Generator().manual_seed(1000 * seed + number // per_pass)
        order = torch.randperm(len(labels), generator=generator)
        first = number % per_pass * budget.batch_size
        return taken(trained, labels, order[first : first + budget.batch_size])

    judged = [
        taken(dev, dev_labels, which)
        for which in torch.arange(len(dev_labels))[: budget.most_judged].split(128)
    ]
    return Source(name="MiniLM-L6, SST-2", hidden=384, model=model, batch=batch, judged=judged, budget=budget)


def decoder_on_wikitext(data: Path, budget: Budget, start: Mapping[str, Tensor] | None = None) -> Source:
    """A Llama of 4 layers, hidden 256, on bytes: begun on one text, fine-tuned and judged on another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = {
        part: torch.frombuffer(bytearray((data / f"{part}.txt").read_bytes()), dtype=torch.uint8)
        for part in ("test", "valid")
    }
    cut = int(len(texts["valid"]) * (1 - HELD_OUT))
    tuned, held_out = texts["valid"][:cut], texts["valid"][cut:]

    def model(seed: int) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=SEQ_LEN,
            use_cache=False,
        )
        made = LlamaForCausalLM(config)
        if start is not None:
            made.load_state_dict(start)
        return made

    def drawn(text: Tensor, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(len(text) - SEQ_LEN, (budget.batch_size,), generator=generator)
        ids = text[first[:, None] + torch.arange(SEQ_LEN)].long()
        return Batch(inputs={"input_ids": ids, "labels": ids})

    def batch(seed: int, number: int) -> Batch:
        text = texts["test"] if seed < 0 else tuned  # -1 begins the model
        return drawn(text, 1_000_000 * (seed + 1) + number)

    rows = held_out[: len(held_out) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN).long()
    judged = [
        Batch(inputs={"input_ids": part, "labels": part}) for part in rows[: budget.most_judged].split(128)
    ]
    return Source(
        name="Llama 4 x 256, WikiText-2", hidden=256, model=model, batch=batch, judged=judged, budget=budget
    )


def begun(source: Source, device: str) -> dict[str, Tensor]:
    """Weights after the budget's `start_steps` of AdamW on the text that no run sees."""
    engine = _engine(METHODS[0], source, 1e-3, -1, device, source.budget.start_steps)
    try:
        for number in range(source.budget.start_steps):
            engine.step([source.batch(-1, number)])
        weights = {name: tensor.clone() for name, tensor in engine.weights()}
    finally:
        engine.close()
    return weights


def run(
    method: Method, source: Source, learning_rate: float, seed: int, device: str, deadline: float
) -> dict[str, Any] | None:
    """One run as a row; `None` if `deadline` (of `time.time`) came first. A run that diverged is a row
    too."""
    budget = source.budget
    row: dict[str, Any] = {
        "source": source.name,
        "method": method.name,
        "learning_rate": learning_rate,
        "seed": seed,
        "end": "ok",
        "curve": [],
    }
    engine = _engine(method, source, learning_rate, seed, device, budget.steps)
    trained_s = 0.0
    try:
        row["curve"].append(_judged(engine, source, 0, trained_s, math.nan))
        losses: list[float] = []
        for step in range(budget.steps):
            if time.time() > deadline:
                return None
            begin_s = now_s()
            stats: StepStats = engine.step([source.batch(seed, step)])
            losses.append(stats.loss)
            if (step + 1) % budget.eval_every == 0 or step + 1 == budget.steps:
                engine.synchronize()
                trained_s += now_s() - begin_s
                mean = sum(losses) / len(losses)
                row["curve"].append(_judged(engine, source, step + 1, trained_s, mean))
                losses = []
            else:
                trained_s += now_s() - begin_s
    except NonFiniteLoss:
        row["end"] = "nan_loss"
    finally:
        engine.close()
    return row


def _judged(engine: Any, source: Source, step: int, trained_s: float, train_loss: float) -> dict[str, Any]:
    found = asdict(engine.evaluate(source.judged))
    return {
        "step": step,
        "trained_s": trained_s,
        "train_loss": None if math.isnan(train_loss) else train_loss,
        "loss": found["loss"] if math.isfinite(found["loss"]) else None,
        "accuracy": found["accuracy"],
    }


def _engine(method: Method, source: Source, learning_rate: float, seed: int, device: str, steps: int) -> Any:
    budget = source.budget
    settings: dict[str, Any] = {
        **TRAINED,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, steps // 20),
    }
    if method.engine == "lsp":
        assert method.d_share is not None
        d = round(method.d_share * source.hidden)
        settings |= {
            "d": d, "r": min(4, d), "check_every": budget.check_every, **method.settings,
            # No limit: how busy the machine is must not decide which projectors are learned.
            "learn_timeout_s": 1e9,
        }  # fmt: skip
    seq_len = source.judged[0].inputs["input_ids"].shape[1]
    workload = Workload(batch_size=budget.batch_size, seq_len=seq_len, dtype="fp32", checkpointing=False)
    context = Context(device=device, workload=workload, seed=seed, total_steps=steps)
    engine = load_engine(method.engine)(parse_settings(method.engine, settings), context)
    engine.setup(Start(source.model(seed)))
    return engine
