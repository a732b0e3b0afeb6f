"""What is said where nothing can be compiled, and what blocks keep for their backward pass."""

from __future__ import annotations

import logging
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from known_shapes import llama
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from engines.costs.memory.activations import block_activation_bytes, product_activation_bytes
from engines.errors import UserError
from engines.kernels import triton_launch
from engines.model import training_regions
from engines.model.blocks import find_blocks
from engines.model.training_regions import TrainingRegions, compiles
from engines.shapes import Workload

GPU = torch.device("cuda")


def test_a_cpu_compiles_where_it_is_asked_to() -> None:
    notes: list[str] = []
    assert compiles(True, torch.device("cpu"), notes)
    assert not compiles("auto", torch.device("cpu"), notes)
    assert notes == []


@pytest.mark.parametrize(
    ("module", "missing", "told"),
    [(training_regions, "find_spec", "Triton"), (triton_launch, "which", "C compiler")],
)
def test_a_gpu_needs_triton_and_a_compiler(
    module: ModuleType, missing: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_regions, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_launch, "which", lambda name: "/usr/bin/cc")
    notes: list[str] = []
    assert compiles("auto", GPU, notes)
    assert not compiles(False, GPU, notes)
    monkeypatch.setattr(module, missing, lambda name: None)
    assert not compiles(False, GPU, notes)
    assert notes == []
    for wanted in (True, "auto"):
        assert not compiles(wanted, GPU, notes)
        assert told in notes.pop()


WIDTH, WIDE, BATCH, LENGTH = 128, 352, 2, 64


def small_llama(**changes: float) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_attention_heads=2,
        num_hidden_layers=1,
        **changes,
    )
    return LlamaForCausalLM(config).bfloat16().train()


def kept_bytes(model: LlamaForCausalLM, hidden: Tensor, gradients: list[Tensor]) -> int:
    """What the block keeps for its backward pass beside weights; `gradients` get those of the hidden state
    and of the weights."""
    _, (block,) = find_blocks(model)
    places = model.model.rotary_emb(hidden, torch.arange(LENGTH)[None])
    apart = {each.data_ptr() for each in (*block.parameters(), *places)}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in apart:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    entering = hidden.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        result = block(entering, position_embeddings=places)
    (result[0] if isinstance(result, tuple) else result).float().square().sum().backward()
    gradients += [entering.grad, *(each.grad for each in block.parameters())]
    model.zero_grad()
    return sum(found.values())


# Both from within torch's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_block_keeps_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the compiler's own choice, and of products alone: two thirds of it, with the same gradients."""
    # What is kept is chosen before kernels are made, which takes most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    shape = llama("small", WIDTH, WIDE, 1, 2, vocabulary=64)
    workload = Workload(batch_size=BATCH, seq_len=LENGTH, dtype="bf16")
    hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.bfloat16)
    gradients: dict[str, list[Tensor]] = {"all": [], "products": []}
    counted = {
        "all": block_activation_bytes(shape, workload, compiled=True),
        "products": product_activation_bytes(shape, workload),
    }
    for keeps in ("all", "products"):
        model = small_llama()
        regions = TrainingRegions(model, compiled=True, recomputed=0, keeps=keeps)
        kept = kept_bytes(model, hidden, gradients[keeps])
        regions.remove()
        assert kept == pytest.approx(counted[keeps], rel=0.05)
    assert all(map(torch.equal, gradients["all"], gradients["products"]))
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


# Both from within torch's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("within", [True, False])
def test_a_recomputed_block_keeps_its_input_alone(within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.bfloat16)
    plain: list[Tensor] = []
    kept_bytes(small_llama(), hidden, plain)
    model = small_llama()
    regions = TrainingRegions(model, compiled=True, recomputed=1, within=within)
    found: list[Tensor] = []
    # Within, the compiler keeps what norms divide by as well, a number for each token.
    assert kept_bytes(model, hidden, found) <= hidden.nbytes + BATCH * LENGTH * 4 * 10
    regions.remove()
    for each, expected in zip(found, plain, strict=True):
        assert torch.allclose(
            each.float(), expected.float(), rtol=0.05, atol=0.05 * float(expected.abs().max())
        )


def test_the_loss_is_compiled_in_steps_whose_blocks_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        made.append(str(inputs[0].shape))
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = small_llama()
    regions = TrainingRegions(model, compiled=True, recomputed=0, falls_back=True)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    compiler: Any = torch.compiler
    with compiler.set_stance("force_eager"):
        model(input_ids=tokens, labels=tokens)
        assert len(made) == 1, "the loss"
    model(input_ids=tokens, labels=tokens)
    assert len(made) == 2, "and the block"
    regions.remove()


def test_a_model_that_draws_keeps_everything() -> None:
    model = small_llama(attention_dropout=0.1)
    with pytest.raises(UserError, match="dropout=0"):
        TrainingRegions(model, compiled=False, recomputed=0, keeps="products")
