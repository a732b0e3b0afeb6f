"""Methods that libraries bring, each against a plain loop with the same library around the model's own
forward pass."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_engines import assert_same_weights, weights

from engines import load_engine
from engines.base import Batch, Context
from engines.errors import NotAvailable, UserError
from engines.first_order.adamw import parameter_groups
from engines.model.blocks import find_blocks
from engines.settings.parse import parse_settings
from engines.shapes import Dtype, Workload
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

RATE = {"learning_rate": 1e-2, "weight_decay": 0.1}
NEEDS = {
    "lora": ("peft",),
    "qlora": ("peft", "bitsandbytes"),
    "adamw-8bit": ("bitsandbytes",),
    "backward-optimizer": (),
    "galore": ("galore_torch", "bitsandbytes"),
    "fsdp2-offload": (),
}
SMALL = {"galore": {"rank": 4, "update_proj_gap": 2}, "lora": {"r": 4}, "qlora": {"r": 4}}


def engine(
    name: str,
    blueprint: TinyBlueprint,
    dtype: Dtype = "fp32",
    checkpointing: bool = False,
    accumulation: int = 1,
    device: str = "cpu",
    **settings: Any,
) -> Any:
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    workload = Workload(
        batch_size=2, seq_len=16, dtype=dtype, checkpointing=checkpointing, accumulation=accumulation
    )
    context = Context(device=device, workload=workload, seed=7, total_steps=6)
    made = load_engine(name)(parse_settings(name, {**RATE, **SMALL.get(name, {}), **settings}), context)
    made.setup(blueprint)
    return made


@pytest.fixture(autouse=True)
def _one_process_group() -> Iterator[None]:
    """Engines of one test share the group; the next test has its own."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Of OPT's blocks, whose output is a view: nothing in the model writes to it in place, as the bits show.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("name", ["backward-optimizer", "fsdp2-offload"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_an_exact_method_has_the_bits_of_native(family: str, dtype: Dtype, name: str) -> None:
    runs = []
    for each in ("native", name):
        made = engine(each, tiny_blueprint(family, tied=True), dtype)
        runs.append(([made.step([batch]).loss for batch in tiny_batches(4, family)], weights(made)))
    assert runs[0][0] == runs[1][0]
    assert_same_weights(runs[1][1], runs[0][1])


def test_clipped_gradients_of_fsdp2_are_those_of_native() -> None:
    runs = []
    for name in ("native", "fsdp2-offload"):
        made = engine(name, tiny_blueprint("llama"), max_grad_norm=0.1)
        runs.append([made.step([batch]).loss for batch in tiny_batches(4, "llama")])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    unclipped = engine("native", tiny_blueprint("llama"))
    assert runs[0] != [unclipped.step([batch]).loss for batch in tiny_batches(4, "llama")]


def test_an_optimizer_inside_the_backward_pass_cannot_clip() -> None:
    with pytest.raises(UserError, match=r"max_grad_norm needs all gradients at once"):
        parse_settings("backward-optimizer", {"max_grad_norm": 1.0})


def test_an_optimizer_inside_the_backward_pass_keeps_no_gradient() -> None:
    made = engine("backward-optimizer", tiny_blueprint("llama"))
    made.step(tiny_batches(1, "llama"))
    assert all(parameter.grad is None for parameter in made.loop.model.parameters())


def test_an_optimizer_inside_the_backward_pass_keeps_no_weights_when_it_is_gone() -> None:
    made = engine("backward-optimizer", tiny_blueprint("llama"))
    made.step(tiny_batches(1, "llama"))
    parameters = [weakref.ref(each) for each in made.loop.model.parameters()]
    del made
    gc.collect()
    assert all(each() is None for each in parameters)


def test_an_optimizer_inside_the_backward_pass_refuses_to_accumulate() -> None:
    with pytest.raises(UserError, match=r"--accumulation 2 .*; use a larger --batch-size"):
        engine("backward-optimizer", tiny_blueprint("llama"), accumulation=2)


def loop(
    family: str, make: Callable[[Any, list[dict[str, Any]]], Any], steps: int = 4
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = tiny_blueprint(family).reference.train()
    optimizer = make(model, parameter_groups(model.parameters(), 0.1))
    losses = []
    for batch in tiny_batches(steps, family):
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: each.detach() for name, each in model.named_parameters()}


def test_eight_bit_adamw_equals_a_plain_loop_with_bitsandbytes() -> None:
    blueprint = wide_blueprint()
    made = engine("adamw-8bit", blueprint)
    losses = [made.step([batch]).loss for batch in tiny_batches(3, "llama")]
    kept = {state["state1"].dtype for state in made.loop.optimizer.state.values()}
    assert kept == {torch.uint8, torch.float32}  # small tensors stay wide
    import bitsandbytes

    model: Any = wide_blueprint().reference.train()
    optimizer = bitsandbytes.optim.AdamW8bit(parameter_groups(model.parameters(), 0.1), lr=1e-2)
    for batch, expected in zip(tiny_batches(3, "llama"), losses, strict=True):
        loss = model(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert float(loss.detach()) == expected
    assert_same_weights(weights(made), {name: each.detach() for name, each in model.named_parameters()})


def wide_blueprint(hidden: int = 64, num_blocks: int = 2) -> TinyBlueprint:
    """With matrices of 4096 elements and more, which have moments of eight bits."""
    import copy

    from transformers import AutoModelForCausalLM

    from tiny_models import tiny_config

    config = tiny_config("llama", tied=False, num_blocks=num_blocks)
    config.hidden_size, config.intermediate_size, config.head_dim = hidden, 2 * hidden, 32
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).float()
    model = copy.deepcopy(reference).to("meta")
    for name, buffer in reference.named_buffers():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_buffer(leaf, buffer.clone(), persistent=False)
    return TinyBlueprint(tiny_blueprint("llama").shape, model, reference)


def test_paged_moments_need_cuda() -> None:
    with pytest.raises(UserError, match="needs CUDA's managed memory"):
        engine("adamw-8bit", tiny_blueprint("llama"), paged=True)


def test_galore_equals_a_plain_loop_with_galore_torch() -> None:
    made = engine("galore", tiny_blueprint("llama"))
    losses = [made.step([batch]).loss for batch in tiny_batches(4, "llama")]
    from galore_torch import GaLoreAdamW

    def make(model: Any, groups: list[dict[str, Any]]) -> Any:
        projected = [each for each in find_blocks(model)[1].parameters() if each.dim() == 2]
        ids = {id(each) for each in projected}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
        low = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std", "weight_decay": 0.1}
        return GaLoreAdamW(
            [{"params": projected, **low}, *rest], lr=1e-2, eps=1e-8, no_deprecation_warning=True
        )

    expected_losses, expected = loop("llama", make)
    assert losses == expected_losses
    assert_same_weights(weights(made), expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_equals_a_plain_loop_with_peft(family: str) -> None:
    made = engine("lora", tiny_blueprint(family))
    losses = [made.step([batch]).loss for batch in tiny_batches(4, family)]
    from peft import LoraConfig, get_peft_model

    def make(model: Any, groups: list[dict[str, Any]]) -> Any:
        torch.manual_seed(7)
        config = LoraConfig(
            r=4, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM",
            fan_in_fan_out=family == "gpt2",
        )  # fmt: skip
        get_peft_model(model, config)
        return torch.optim.AdamW(
            [each for each in model.parameters() if each.requires_grad], lr=1e-2, weight_decay=0.1, fused=True
        )

    expected, _ = loop(family, make)
    # One random matrix for each layer, drawn in another order of layers: the first step has none of it.
    assert losses[0] == expected[0]
    assert losses == pytest.approx(expected, abs=2e-2)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_merged_weights_give_the_loss_of_the_adapted_model(name: str) -> None:
    made = engine(name, tiny_blueprint("llama"))
    batches = tiny_batches(4, "llama")
    for batch in batches:
        made.step([batch])
    adapted = made.evaluate(batches)
    plain: Any = tiny_blueprint("llama").reference
    plain.load_state_dict(weights(made))
    merged = [float(plain(**batch.inputs).loss.detach()) for batch in batches]
    assert sum(merged) / len(merged) == pytest.approx(adapted.loss, rel=1e-5)


def test_lora_trains_adapters_alone_in_fp32() -> None:
    made = engine("lora", tiny_blueprint("llama"), "bf16", target_modules="q_proj,v_proj", weight_decay=0)
    before = {name: each.detach().clone() for name, each in made.loop.model.named_parameters()}
    made.step(tiny_batches(1, "llama"))
    changed = {n for n, each in made.loop.model.named_parameters() if not torch.equal(each, before[n])}
    assert changed == {name for name in before if "lora_B" in name}  # A moves once B is not zero
    assert len(changed) == 3 * 2
    assert {before[name].dtype for name in changed} == {torch.float32}


def test_a_head_that_is_new_is_trained_with_the_adapters() -> None:
    made = engine("lora", tiny_blueprint("roberta"))
    trained = {name for name, each in made.loop.model.named_parameters() if each.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"roberta", "classifier"}
    assert all("lora_" in name for name in trained if name.startswith("roberta"))


def test_a_layer_that_no_block_has_is_named() -> None:
    with pytest.raises(UserError, match=r"no block has a linear layer 'wq'; choose from: .*q_proj"):
        engine("lora", tiny_blueprint("llama"), target_modules="q_proj,wq")


def test_matrices_that_cannot_be_held_in_four_bits_are_refused() -> None:
    with pytest.raises(UserError, match=r"four bits; use lora"):
        engine("qlora", tiny_blueprint("gpt2"))


@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bits_are_near_the_weights(double_quant: bool) -> None:
    made = engine("qlora", wide_blueprint(), double_quant=double_quant)
    wide = dict(wide_blueprint().reference.named_parameters())
    for name, tensor in weights(made).items():
        expected = wide[name].detach()
        if "_proj" in name:
            assert float((tensor - expected).norm() / expected.norm()) < 0.15, name
        else:
            assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NEEDS)
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, name: str, checkpointing: bool) -> None:
    batches = tiny_batches(6, "llama")
    straight = engine(name, tiny_blueprint("llama"), "bf16", checkpointing)
    losses = [straight.step([batch]).loss for batch in batches]
    first = engine(name, tiny_blueprint("llama"), "bf16", checkpointing)
    for batch in batches[:3]:
        first.step([batch])
    first.save(tmp_path)
    first.step([batches[3]])  # saving leaves the engine as it was
    second = engine(name, tiny_blueprint("llama"), "bf16", checkpointing)
    second.load(tmp_path)
    assert [second.step([batch]).loss for batch in batches[3:]] == losses[3:]
    assert_same_weights(weights(second), weights(straight))


@pytest.mark.parametrize("name", NEEDS)
def test_checkpointing_and_evaluation_change_no_step(name: str) -> None:
    batches = tiny_batches(3, "llama")
    plain = engine(name, tiny_blueprint("llama"))
    checked = engine(name, tiny_blueprint("llama"), checkpointing=True)
    for batch in batches:
        loss = plain.step([batch]).loss
        assert checked.step([batch]).loss == loss
        checked.evaluate(batches)


@pytest.mark.parametrize("name", [name for name, modules in NEEDS.items() if modules])
def test_a_library_that_is_missing_ends_the_set_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blueprint = tiny_blueprint("llama")
    kind = load_engine(name)
    context = Context(device="cpu", workload=Workload(batch_size=1, seq_len=8), seed=0, total_steps=1)
    made = kind(parse_settings(name, {}), context)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(NotAvailable, match=r"is not installed \(pip install 'lspzo-bench\["):
        made.setup(blueprint)
    assert kind.why_not_available() is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEEDS)
def test_on_a_gpu_each_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    batches = tiny_batches(6, "llama")
    straight = engine(name, wide_blueprint(), "bf16", True, device="cuda:0")
    losses = [straight.step([batch]).loss for batch in batches]
    first = engine(name, wide_blueprint(), "bf16", True, device="cuda:0")
    for batch in batches[:3]:
        first.step([batch])
    first.save(tmp_path)
    second = engine(name, wide_blueprint(), "bf16", True, device="cuda:0")
    second.load(tmp_path)
    assert [second.step([batch]).loss for batch in batches[3:]] == losses[3:]
    assert_same_weights(weights(second), weights(straight))


@pytest.mark.gpu
def test_on_a_gpu_lora_compiled_and_captured_is_near_eager() -> None:
    batches = tiny_batches(5, "llama")
    eager = engine("lora", wide_blueprint(), "bf16", True, device="cuda:0", compile=False, graphs=False)
    best = engine("lora", wide_blueprint(), "bf16", True, device="cuda:0", compile=True, graphs=True)
    expected = [eager.step([batch]).loss for batch in batches]
    assert [best.step([batch]).loss for batch in batches] == pytest.approx(expected, rel=2e-2)
    assert best.loop.notes == []
    best.close()


@pytest.mark.gpu
def test_on_a_gpu_an_optimizer_inside_the_backward_pass_has_the_bits_of_native() -> None:
    batches = tiny_batches(4, "llama")
    native = engine("native", wide_blueprint(), "bf16", device="cuda:0", compile=False, graphs=False)
    inside = engine("backward-optimizer", wide_blueprint(), "bf16", device="cuda:0", compile=False)
    assert [inside.step([b]).loss for b in batches] == [native.step([b]).loss for b in batches]
    assert_same_weights(weights(inside), weights(native))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_on_a_gpu_an_optimizer_in_a_graph_has_the_bits_of_one_outside(
    dtype: Dtype, checkpointing: bool, compiled: bool
) -> None:
    """With an evaluation and batches of another length between."""
    batches = tiny_batches(20, "llama")
    short = Batch(inputs={name: each[:, :8].contiguous() for name, each in batches[0].inputs.items()})
    batches[10:10] = [short] * 3
    runs = []
    for graphs in (False, True):
        made = engine(
            "backward-optimizer", wide_blueprint(), dtype, checkpointing,
            device="cuda:0", compile=compiled, graphs=graphs,
        )  # fmt: skip
        losses = [made.step([batch]).loss for batch in batches[:5]]
        evaluated = made.evaluate(batches[:2])
        losses += [made.step([batch]).loss for batch in batches[5:]]
        assert made.notes == []
        assert graphs == (made.loop.captured is not None and made.loop.captured.holds_memory)
        runs.append((losses, evaluated, weights(made)))
        made.close()
    assert runs[1][:2] == runs[0][:2]
    assert_same_weights(runs[1][2], runs[0][2])


@pytest.mark.gpu
def test_on_a_gpu_an_optimizer_in_a_graph_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """That the engine itself wrote, after graphs had gone on from it: states lie at other places then."""
    batches = tiny_batches(9, "llama")
    straight = engine("backward-optimizer", wide_blueprint(), "bf16", device="cuda:0", graphs=False)
    losses = [straight.step([batch]).loss for batch in batches]
    made = engine("backward-optimizer", wide_blueprint(), "bf16", device="cuda:0")
    assert [made.step([batch]).loss for batch in batches[:4]] == losses[:4]
    made.save(tmp_path)
    made.step([batches[4]])
    made.load(tmp_path)
    assert [made.step([batch]).loss for batch in batches[4:]] == losses[4:]
    assert_same_weights(weights(made), weights(straight))


@pytest.mark.gpu
def test_on_a_gpu_gradients_in_a_graph_are_never_all_there() -> None:
    """Within a tenth of the GPU memory without graphs, workspaces of products on the graph's stream included,
    where all gradients would take a third more."""
    blueprint = wide_blueprint(hidden=2048, num_blocks=12)
    reserved = []
    for graphs in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        made = engine("backward-optimizer", blueprint, "bf16", device="cuda:0", compile=False, graphs=graphs)
        for batch in tiny_batches(4, "llama"):
            made.step([batch])
        assert made.notes == []
        reserved.append(torch.cuda.max_memory_reserved() - before)
        made.close()
        del made
        blueprint = wide_blueprint(hidden=2048, num_blocks=12)
    assert reserved[1] < 1.1 * reserved[0], reserved


@pytest.mark.gpu
def test_on_a_gpu_moments_of_eight_bits_can_be_paged() -> None:
    plain, paged = (
        engine("adamw-8bit", wide_blueprint(), "bf16", device="cuda:0", paged=each) for each in (False, True)
    )
    for batch in tiny_batches(3, "llama"):
        assert plain.step([batch]).loss == paged.step([batch]).loss
