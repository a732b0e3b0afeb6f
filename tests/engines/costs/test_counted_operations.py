"""Kernels and bytes that costs count, beside the operations that torch runs, on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engines import load_engine
from engines.base import Context
from engines.costs.loss import CHUNK_LOGIT_BYTES_EAGER, LOGIT_BYTES_EAGER
from engines.costs.transformer import SAVED_GATED, SAVED_PLAIN, STACKED_GATED_KERNELS
from engines.first_order.head_loss import loss_and_slope
from engines.settings.parse import parse_settings
from engines.zeroth_order.perturbed_model import PerturbedModel
from engines.zeroth_order.perturbed_weights import BlockScratch
from harness.data.batches import make_data
from harness.models.blueprint import make_blueprint
from harness.models.configs import load_config
from harness.records.job import DataSource, Job, ModelSource
from harness.resolve import resolve_shape

MAKE_NOTHING = ("aten.empty.memory_format", "aten.empty_like.default", "aten.detach.default")


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [found for each in value for found in tensors(each)] if isinstance(value, list | tuple) else []


class Operations(TorchDispatchMode):
    """Those that make or change a tensor, with the bytes that each moves of tensors of `elements`."""

    def __init__(self, elements: int | None = None) -> None:
        super().__init__()
        self.elements = elements
        self.is_on = True
        self.count: Counter[str] = Counter()
        self.moved_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, read, written = str(func), tensors(args), tensors(out)
        places = {each.untyped_storage().data_ptr() for each in read}
        changes = name.split(".")[1].endswith("_") or name.endswith(".out")
        is_view = not changes and any(each.untyped_storage().data_ptr() in places for each in written)
        if self.is_on and written and not is_view and name not in MAKE_NOTHING:
            self.count[name] += 1
            self.moved_bytes[name] += sum(
                each.numel() * each.element_size()
                for each in (*read, *written)
                if each.numel() == self.elements
            )
        return out


def test_kernels_of_a_gated_block_in_a_stacked_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that make perturbed weights. Its norms run once for each side."""
    operations = Operations()
    operations.is_on = False

    def within(owner: Any, name: str, *, counts: bool) -> None:
        own = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            before, operations.is_on = operations.is_on, counts
            try:
                return own(*args, **kwargs)
            finally:
                operations.is_on = before

        monkeypatch.setattr(owner, name, run)

    within(PerturbedModel, "run", counts=True)
    within(BlockScratch, "open", counts=False)
    job = Job(
        model=ModelSource(name="tiny-llama", random_weights=True), data=DataSource(train="random"),
        batch_size=1, seq_len=16, dtype="bf16", checkpointing=False, steps=2, warmup_steps=0,
    )  # fmt: skip
    shape = resolve_shape(job)
    engine = load_engine("mezo")(
        parse_settings("mezo", {}), Context(device="cpu", workload=job.workload, seed=0, total_steps=2)
    )
    data = make_data(job, shape)
    engine.setup(make_blueprint(job, shape, data.step_batches(0)[0]))
    with operations:
        engine.step(data.step_batches(0))
    engine.close()
    assert sum(operations.count.values()) == STACKED_GATED_KERNELS * shape.num_blocks


@pytest.mark.parametrize(("name", "saved"), [("tiny-llama", SAVED_GATED), ("tiny-opt", SAVED_PLAIN)])
def test_tensors_that_a_block_saves_for_the_backward_pass(name: str, saved: int) -> None:
    """For each of them a block that runs again calls `torch.utils.checkpoint`'s Python."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(load_config(ModelSource(name=name, random_weights=True)))
    counts = []
    for blocks in (1, 2):
        config = AutoConfig.for_model(**{**given, "num_hidden_layers": blocks, "dropout": 0.0})
        model = AutoModelForCausalLM.from_config(config).train()
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda kept: kept):
            model(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
        counts.append(len(packed))
    assert counts[1] - counts[0] == saved


TOKENS, VOCABULARY = 24, 40


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_bytes_of_a_logit_whose_loss_is_not_compiled(name: str, dtype: torch.dtype) -> None:
    """Of what torch reads, the picked logits are few, and their gradient is written without a look."""
    hidden = torch.randn(TOKENS, 8).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 8).to(dtype).requires_grad_()
    with Operations(TOKENS * VOCABULARY) as operations:
        logits = nn.functional.linear(hidden, weight)
        nn.functional.cross_entropy(logits.float(), torch.arange(TOKENS)).backward()
    seen = operations.moved_bytes
    seen["aten.nll_loss_forward.default"] = 0
    seen["aten.nll_loss_backward.default"] = 4 * TOKENS * VOCABULARY
    assert sum(seen.values()) == LOGIT_BYTES_EAGER[name] * TOKENS * VOCABULARY


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_bytes_of_a_logit_in_a_chunk_that_is_not_compiled(name: str, dtype: torch.dtype) -> None:
    """The log-sum-exp is one operation here and reads and writes 20 bytes more inside."""
    hidden, weight = torch.randn(TOKENS, 8).to(dtype), torch.randn(VOCABULARY, 8).to(dtype)
    with Operations(TOKENS * VOCABULARY) as operations:
        _, slope = loss_and_slope(hidden, weight, None, torch.arange(TOKENS), torch.tensor(1.0 / TOKENS))
        torch.mm(slope, weight)
        torch.mm(slope.T, hidden)
    seen = operations.moved_bytes
    seen["aten.gather.default"] = 0
    inside = 20 * TOKENS * VOCABULARY
    assert sum(seen.values()) + inside == CHUNK_LOGIT_BYTES_EAGER[name] * TOKENS * VOCABULARY, seen
