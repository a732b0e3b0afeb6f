"""A step reads its losses from the device and nothing else; masks are transformers' own all the same."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from engines.base import Batch, Context
from engines.methods.lsp import Lsp
from engines.methods.mezo import Mezo
from engines.methods.native import Native
from engines.methods.zo2 import Zo2
from engines.model.attention_masks import has_padding, known_padding, with_mask
from engines.model.blocks import BlockDriver
from engines.settings.first_order import NativeSettings
from engines.settings.lsp import LspSettings
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Head, Workload
from engines.zeroth_order.forward_passes import LossSums
from tiny_families import FAMILIES, blueprint_of
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint, usual_head

PADDINGS = ["no mask", "ones", "padded"]
MODELS: list[tuple[str, Head]] = [
    ("opt", "causal_lm"), ("llama", "causal_lm"), ("qwen2", "causal_lm"), ("gpt2", "causal_lm"),
    ("roberta", "classification"), ("bert", "question_answering"), ("llama", "classification"),
    ("opt", "question_answering"),
]  # fmt: skip


def masked(batch: Batch, padding: str) -> Batch:
    inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "attention_mask"}
    ids = inputs["input_ids"]
    if padding != "no mask":
        inputs["attention_mask"] = torch.ones_like(ids)
    if padding == "padded":
        inputs["attention_mask"][0, ids.shape[1] - 4 :] = 0
    return Batch(inputs=inputs)


def batches_of(family: str, head: Head, padding: str, count: int = 4) -> list[Batch]:
    return [masked(batch, padding) for batch in tiny_batches(count, family, head=head)]


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values that are read, and results whose size
    follows from values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        reading = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2)
        by_mask = func.overloadpacket is aten.index and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += by_mask or func.overloadpacket in reading
        return func(*args, **(kwargs or {}))


def test_reads_are_counted() -> None:
    values = torch.arange(3)
    with Reads() as reads:
        assert (values < 3).all()
        assert values[0].item() == 0
        assert values[values > 0].numel() == 2
        assert values.nonzero().numel() == 2
        assert values[values].numel() == 3
    assert reads.count == 4


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_masks_are_those_that_transformers_builds(family: str, padding: str) -> None:
    """What each block is called with and what leaves the model are bit-equal, and nothing is read."""
    blueprint = blueprint_of(family)
    inputs = batches_of(family, "causal_lm", padding, 1)[0].inputs
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    driver = BlockDriver(blueprint.reference)
    with torch.no_grad():
        plain = driver.record(inputs)
        last = torch.ones_like(plain.hidden)
        expected = driver.finish(inputs, last).logits
        told = with_mask(inputs)
        with known_padding(has_padding(inputs)), Reads() as reads:
            known = driver.record(told)
            found = driver.finish(told, last).logits
            hidden = known.hidden
            for index, call in enumerate(known.calls):
                if family != "mixtral":  # whose experts pick their tokens by looking at them
                    hidden = driver.run(index, call, hidden)
        whole = blueprint.reference(**inputs).logits
        with known_padding(has_padding(inputs)):
            assert torch.equal(blueprint.reference(**told).logits, whole)
    assert reads.count == 0
    assert torch.equal(found, expected)
    assert torch.equal(known.hidden, plain.hidden)
    for one, other in zip(known.calls, plain.calls, strict=True):
        for name in ("attention_mask", "alibi", "position_ids"):
            if name in one.kwargs:
                assert_same(one.kwargs[name], other.kwargs[name])


def assert_same(one: Any, other: Any) -> None:
    assert (one is None) == (other is None)
    assert one is None or torch.equal(one, other)


def test_the_registry_is_as_it_was() -> None:
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), known_padding(True), known_padding(False):
        raise KeyError
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before


def test_threads_know_each_their_own_and_leave_nothing_behind() -> None:
    """One enters, another enters, the first leaves: what it took for usual is not what is left at the end."""
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    seen: list[bool] = []

    def build(**arguments: Any) -> None:
        seen.append(arguments["attention_mask"] is not None)

    first, second = known_padding(True), known_padding(False)
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = build
    try:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            one.submit(first.__enter__).result()
            other.submit(second.__enter__).result()
            for each in (one, other):
                each.submit(
                    lambda: ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](attention_mask=torch.ones(1))
                ).result()
            one.submit(first.__exit__, None, None, None).result()
            assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not build
            other.submit(second.__exit__, None, None, None).result()
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is build
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = before["sdpa"]
    assert seen == [True, False]
    assert dict(ALL_MASK_ATTENTION_FUNCTIONS) == before


def test_padding_is_seen_on_the_host() -> None:
    ids = torch.zeros((2, 3), dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert not has_padding({"input_ids": ids})
    assert not has_padding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert has_padding({"input_ids": ids, "attention_mask": mask})
    assert with_mask({"input_ids": ids})["attention_mask"].equal(torch.ones_like(ids))
    assert with_mask({"input_ids": ids, "attention_mask": mask})["attention_mask"] is mask


@contextmanager
def host_waits_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Whatever makes the host wait for the GPU is an error, but for reading losses. The steps that did."""
    read = LossSums.read
    steps: list[int] = []

    def allowed(sums: LossSums, count: int, step: int) -> list[float]:
        steps.append(step)
        _debug_waits("default")
        try:
            return read(sums, count, step)
        finally:
            _debug_waits("error")

    with monkeypatch.context() as patch:
        patch.setattr(LossSums, "read", allowed)
        _debug_waits("error")
        try:
            yield steps
        finally:
            _debug_waits("default")


def _debug_waits(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_what_would_wait_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.ones(1, device="cuda:0")
    with pytest.raises(RuntimeError, match="synchroniz"), host_waits_once(monkeypatch):
        value.item()


def steps_of(
    kind: type[Mezo] | type[Zo2], blueprint: TinyBlueprint, batches: Sequence[Batch], monkeypatch: Any
) -> list[int]:
    """Steps that read losses, of three pairs of `batches` after as many steps that may wait.

    Kernels are compiled, blocks captured as graphs and tables sent up in the first steps.
    """
    workload = Workload(batch_size=2, seq_len=16, accumulation=2, dtype="bf16")
    context = Context(device="cuda:0", workload=workload, seed=0, total_steps=100)
    settings = Zo2Settings(resident_blocks=1, fold_every=2) if kind is Zo2 else MezoSettings()
    made: Any = kind(settings, context)  # type: ignore[arg-type]
    made.setup(blueprint)
    groups = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    for group in groups * 3:
        made.step(group)
    with host_waits_once(monkeypatch) as steps:
        for group in groups * 3:
            made.step(group)
    made.close()
    return steps


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("family", "head"), MODELS)
@pytest.mark.parametrize("kind", [Mezo, Zo2])
def test_a_step_waits_for_the_gpu_once(
    kind: type[Mezo] | type[Zo2],
    family: str,
    head: Head,
    padding: str,
    graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    batches = batches_of(family, head, padding)
    blueprint = tiny_blueprint(family, tied=head == usual_head(family), num_blocks=3, head=head)
    steps = steps_of(kind, blueprint, batches, monkeypatch)
    assert steps == list(range(6, 12))


def first_order(kind: type[Native] | type[Lsp], device: str, blueprint: TinyBlueprint) -> Any:
    workload = Workload(batch_size=2, seq_len=16, accumulation=2, dtype="bf16")
    context = Context(device=device, workload=workload, seed=0, total_steps=100)
    settings: Any = NativeSettings() if kind is Native else LspSettings(d=8, r=2)
    engine: Any = kind(settings, context)
    engine.setup(blueprint)
    return engine


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("family", "head"), MODELS)
@pytest.mark.parametrize("kind", [Native, Lsp])
def test_a_first_order_step_reads_its_loss_and_masks_on_the_host(
    kind: type[Native] | type[Lsp], family: str, head: Head, padding: str
) -> None:
    """`lsp` keeps the loss in host memory, and reads no tensor of the device at all."""
    blueprint = tiny_blueprint(family, tied=head == usual_head(family), num_blocks=2, head=head)
    engine = first_order(kind, "cpu", blueprint)
    try:
        batches = batches_of(family, head, padding, 2)
        engine.step(batches)  # lsp tests its projectors in the first step
        with Reads() as reads:
            engine.step(batches)
    finally:
        engine.close()
    masks_on_host = 0 if padding == "no mask" else len(batches)
    assert reads.count == 1 + masks_on_host


@pytest.mark.gpu
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("family", "head"), MODELS)
@pytest.mark.parametrize("kind", [Native, Lsp])
def test_a_first_order_step_waits_for_the_gpu_once(
    kind: type[Native] | type[Lsp], family: str, head: Head, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`native` reads its loss. `lsp` waits for its loss on the host, which torch does not count."""
    blueprint = tiny_blueprint(family, tied=head == usual_head(family), num_blocks=2, head=head)
    engine = first_order(kind, "cuda:0", blueprint)
    reads: list[int] = []
    read = torch.Tensor.__float__

    def allowed(tensor: torch.Tensor) -> float:
        if not tensor.is_cuda:
            return read(tensor)
        reads.append(1)
        _debug_waits("default")
        try:
            return read(tensor)
        finally:
            _debug_waits("error")

    batches = batches_of(family, head, padding)
    try:
        for _ in range(3):  # projectors are tested, kernels compiled and blocks captured
            engine.step(batches[:2])
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__float__", allowed)
            _debug_waits("error")
            try:
                for _ in range(3):
                    engine.step(batches[:2])
            finally:
                _debug_waits("default")
    finally:
        engine.close()
    assert len(reads) == (3 if kind is Native else 0)
