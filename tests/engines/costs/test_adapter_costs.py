"""What adapters keep in blocks, held against what autograd saves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.base import Batch
from engines.costs.adapters import KEPT_IN_FP32, KEPT_IN_FP32_OF_GPT2
from engines.costs.loss import TUNING_BYTES
from engines.costs.table import traffic
from engines.costs.transformer import has_long_activation
from engines.first_order.adapters import adapted_layers, add_adapters, run_in_bf16
from engines.model.blocks import materialize
from engines.model.training_regions import TrainingRegions
from engines.settings.libraries import LoraSettings
from engines.settings.parse import parse_settings
from engines.shapes import Workload
from harness.models.blueprint import make_blueprint
from harness.models.configs import NAMED_SHAPES, named_shape
from harness.records.job import make_job

WORKLOAD = Workload(batch_size=2, seq_len=64, dtype="bf16", checkpointing=False)


def saved_bytes(name: str, *, compiled: bool = False) -> int:
    """Of a forward pass with adapters of rank 1 beside each matrix, parameters left out."""
    shape = named_shape(name)
    job = make_job({"model": {"name": name, "random_weights": True}}, name)
    ids = torch.arange(128).view(2, 64) % shape.vocabulary
    blueprint = make_blueprint(job, shape, Batch(inputs={"input_ids": ids, "labels": ids}))
    settings = LoraSettings(r=1)
    layers = adapted_layers(blueprint.model, settings)
    model = materialize(blueprint, torch.device("cpu"), torch.bfloat16)
    add_adapters(model, settings, layers, 0)
    run_in_bf16(model, torch.device("cpu"))
    if compiled:
        TrainingRegions(model, compiled=True, recomputed=0)
    owned = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in owned:
            found.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids)
    return sum(each.untyped_storage().nbytes() for each in found.values())


def differences(name: str, in_fp32: int, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> tuple[int, int]:
    """What two blocks more keep, as it is counted and as it is saved; of each `in_fp32` is a GPU's alone."""
    counted, saved = [], []
    for num_blocks in (2, 4):
        known = NAMED_SHAPES[name]
        config: dict[str, Any] = {**known.config}
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = num_blocks
        with monkeypatch.context() as patch:
            patch.setitem(NAMED_SHAPES, name, replace(known, config=config))
            given = parse_settings("lora", {"r": "1", "graphs": "false", "compile": str(compiled).lower()})
            kinds = traffic("lora", named_shape(name), WORKLOAD, given).gpu_memory_bytes
            counted.append(kinds["activations"] + kinds["kept by adapters"] - num_blocks * in_fp32)
            saved.append(saved_bytes(name, compiled=compiled))
    return counted[1] - counted[0], saved[1] - saved[0]


# Both from within torch's compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["tiny-opt", "tiny-gpt2", "tiny-qwen2"])
def test_compiled_blocks_with_adapters_keep_what_is_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    # What is kept is chosen before kernels are made, which takes most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    counted, saved = differences(name, 0, monkeypatch, compiled=True)
    assert counted == pytest.approx(saved, rel=0.06)


@pytest.mark.parametrize("name", ["tiny-opt", "tiny-gpt2", "tiny-qwen2", "tiny-llama"])
def test_eager_blocks_with_adapters_keep_what_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    shape = named_shape(name)
    in_fp32 = 0  # a CPU's autocast runs no norm in it
    if not shape.gated_mlp:
        of_element = KEPT_IN_FP32_OF_GPT2 if has_long_activation(shape) else KEPT_IN_FP32
        in_fp32 = WORKLOAD.batch_size * WORKLOAD.seq_len * shape.hidden * of_element
    counted, saved = differences(name, in_fp32, monkeypatch, compiled=False)
    assert counted == pytest.approx(saved, rel=0.07)


@pytest.mark.parametrize(("name", "times"), [("opt-125m", 1), ("roberta-base", 0)])
def test_blocks_of_four_bits_that_end_in_a_sum_give_fp32_states(name: str, times: int) -> None:
    """Blocks that end in LayerNorm give them with any matrices."""
    shape, workload = named_shape(name), Workload(batch_size=16, seq_len=512)
    told = {"checkpointed_blocks": str(shape.num_blocks), "graphs": "false"}
    lora, qlora = (
        traffic(engine, shape, workload, parse_settings(engine, told)).gpu_memory_bytes
        for engine in ("lora", "qlora")
    )
    more = qlora["activations"] - lora["activations"]
    assert more == times * shape.num_blocks * workload.hidden_bytes(shape)


def test_buffers_of_products_are_free_while_kernels_are_timed() -> None:
    shape, workload = named_shape("opt-125m"), Workload(batch_size=16, seq_len=512)
    told = {"checkpointed_blocks": "12", "graphs": "false", "loss_tokens": "1024"}
    kinds = traffic("qlora", shape, workload, parse_settings("qlora", told)).gpu_memory_bytes
    assert kinds["buffers"] + kinds["scratch"] == TUNING_BYTES
