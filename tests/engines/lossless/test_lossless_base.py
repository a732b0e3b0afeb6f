"""mezo and zo2 on a lossless base: the bits of a full one, wherever blocks are and whatever they hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zeroth_order_runs import (
    KNOBS,
    Engine,
    assert_all_same_steps,
    assert_replays,
    assert_same_steps,
    assert_same_weights,
    context,
    make_mezo,
    make_zo2,
    save,
)

from engines.base import Update
from engines.decoding import GenerationRequest
from engines.errors import UserError
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import MezoSettings, Zo2Settings, approximation
from tiny_models import TinyBlueprint, tiny_batches, tiny_blueprint

BF16 = context(dtype="bf16")
COMBINATIONS: list[dict[str, Any]] = [
    {"fold_every": 3},
    {"train": "lora"},
    {"train": "last:1", "fold_every": 2},
    {"noise": "rademacher", "queries": 2, "fold_every": 2},
    {"estimator": "fzoo", "noise": "rademacher", "queries": 3},
    {"estimator": "lozo", "lozo_window": 2, "weight_decay": 0.0},
]


def alike(made: Engine) -> list[str]:
    """Names of the matrices in tiles."""
    kept = made.blocks.tensors(0)
    return [name for name, weight in kept.items() if weight.dtype == torch.uint8]


@pytest.mark.parametrize("knobs", COMBINATIONS, ids=str)
def test_steps_and_weights_have_the_bits_of_a_full_base(knobs: dict[str, Any], tmp_path: Path) -> None:
    """In memory, streamed with and without resident blocks, and with some on disk."""
    in_memory = {key: value for key, value in knobs.items() if key != "fold_every"}
    made = lambda: tiny_blueprint("llama")  # noqa: E731
    full = make_mezo(made(), BF16, **in_memory)
    on_disk = {"disk_blocks": 1, "disk_folder": str(tmp_path)}
    others: list[Engine] = [
        make_mezo(made(), BF16, base="lossless", **in_memory),
        make_zo2(made(), BF16, base="lossless", **knobs),
        make_zo2(made(), BF16, base="lossless", resident_blocks=1, **on_disk, **knobs),
    ]
    assert len(alike(others[0])) == 3 * 7
    assert_all_same_steps(full, others, tiny_batches(4, "llama"))
    expected = full.evaluate(tiny_batches(2, "llama"))
    assert all(each.evaluate(tiny_batches(2, "llama")) == expected for each in others)
    for each in others:
        each.close()


@pytest.mark.parametrize("family", ["opt", "gpt2", "bert"])
def test_any_family_with_micro_batches(family: str) -> None:
    full = make_mezo(tiny_blueprint(family), BF16)
    lossless = make_zo2(tiny_blueprint(family), BF16, base="lossless", fold_every=2)
    assert_same_steps(full, lossless, tiny_batches(6, family), accumulation=2)
    assert_same_weights(full, lossless)


@pytest.mark.parametrize(
    ("device", "steps"), [("cpu", 20), pytest.param("cuda", 1000, marks=pytest.mark.gpu)]
)
def test_copies_that_are_late_change_nothing(device: str, steps: int) -> None:
    """On a GPU copies are held up at random; on a CPU the order of work alone is tested."""
    where = context(device, "bf16", steps=1000)
    late = Zo2(Zo2Settings(**KNOBS, base="lossless", fold_every=2), where)
    chosen = random.Random(0)
    late.link_delay = lambda: chosen.randrange(2_000_000)
    late.setup(tiny_blueprint("opt"))
    full = make_mezo(tiny_blueprint("opt"), where)
    batches = tiny_batches(4, "opt")
    assert_same_steps(full, late, [batches[i % 4] for i in range(steps)])
    assert_same_weights(full, late)


def wild(blueprint: TinyBlueprint, *names: str) -> TinyBlueprint:
    """With matrices that lossless tiles have no room for: of sizes anywhere between 2^-60 and 1."""
    made = torch.Generator().manual_seed(0)
    for name in names:
        weight = blueprint.reference.get_parameter(name)
        sizes = torch.exp2(-60 * torch.rand(weight.shape, generator=made))
        with torch.no_grad():
            weight.copy_(weight.sign() * sizes * 0.05)
    return blueprint


@pytest.mark.parametrize("train", ["all", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_matrix_without_room_stays_as_it_is(train: str, accumulation: int) -> None:
    """The first of a block's, one in its middle, and all of a block's."""
    layers = "model.layers"
    names = [f"{layers}.0.self_attn.q_proj.weight", f"{layers}.1.mlp.gate_proj.weight"]
    every = tiny_blueprint("llama").reference.named_parameters()
    names += [name for name, _ in every if f"{layers}.2." in name and "norm" not in name]
    made = lambda: wild(tiny_blueprint("llama"), *names)  # noqa: E731
    full = make_mezo(made(), BF16, train=train)
    others: list[Engine] = [
        make_mezo(made(), BF16, train=train, base="lossless"),
        make_zo2(made(), BF16, train=train, base="lossless", fold_every=2),
    ]
    for each in others:
        assert len(alike(each)) == 3 * 7 - 2 - 7
    batches = tiny_batches(2 * accumulation, "llama")
    for start in range(0, len(batches), accumulation):
        group = batches[start : start + accumulation]
        expected = full.step(group)
        assert all(each.step(group).updates == expected.updates for each in others)
    for each in others:
        assert_same_weights(full, each)


def test_pruned_weights_and_special_numbers_have_room() -> None:
    blueprint = tiny_blueprint("opt")
    weight = blueprint.reference.get_parameter("model.decoder.layers.0.fc1.weight")
    with torch.no_grad():
        weight[::2] = 0.0
        weight[1, :3] = torch.tensor([-0.0, 1e-40, 2.0**-120])
    lossless = make_zo2(blueprint, BF16, base="lossless")
    assert "model.decoder.layers.0.fc1.weight" in alike(lossless)
    kept = dict(lossless.weights())["model.decoder.layers.0.fc1.weight"]
    assert torch.equal(kept.view(torch.int16), weight.bfloat16().view(torch.int16))


def test_a_checkpoint_is_read_by_either_base(tmp_path: Path) -> None:
    batches = tiny_batches(6, "opt")
    of = {"full": {}, "lossless": {"base": "lossless", "fold_every": 4}}
    made = {name: make_zo2(tiny_blueprint("opt"), BF16, train="all", **knobs) for name, knobs in of.items()}
    assert_same_steps(made["full"], made["lossless"], batches[:3])
    folders = {name: save(each, tmp_path / name) for name, each in made.items()}
    assert_same_steps(made["full"], made["lossless"], batches[3:])
    for name in of:
        loaded = make_zo2(tiny_blueprint("opt", seed=1), BF16, **of[name])
        loaded.load(folders["lossless" if name == "full" else "full"])
        for batch in batches[3:]:
            loaded.step([batch])
        assert_same_weights(made["full"], loaded)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_frozen_weights_that_were_damaged_end_the_step(device: str) -> None:
    """Where they lie on the host, and in an export."""
    damaged = make_zo2(tiny_blueprint("opt"), context(device, "bf16"), base="lossless", train="lora")
    damaged.step(tiny_batches(1, "opt"))
    damaged.synchronize()
    damaged.blocks.tensors(0)["model.decoder.layers.2.fc1.weight"].view(-1)[77] ^= 8
    batches = tiny_batches(1, "opt")

    def twice(use: Callable[[], object]) -> None:
        for _ in range(2):  # what had come up already was read before
            use()

    uses: list[Callable[[], object]] = [
        lambda: damaged.step(batches), lambda: damaged.evaluate(batches), lambda: list(damaged.weights()),
        lambda: list(damaged.generate(GenerationRequest(prompts=((1, 2),), max_new_tokens=2))),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(UserError, match=r"are not those that were stored.*last checkpoint") as raised:
            twice(use)
        assert len(str(raised.value)) < 200


def test_a_log_is_replayed_to_the_same_bits() -> None:
    batches = tiny_batches(5, "opt")
    full = make_zo2(tiny_blueprint("opt"), BF16, fold_every=2)
    updates: list[Update] = [update for batch in batches for update in full.step([batch]).updates]
    others: list[Engine] = [
        make_zo2(tiny_blueprint("opt"), BF16, base="lossless", fold_every=4),
        make_mezo(tiny_blueprint("opt"), BF16, base="lossless"),
    ]
    assert_replays(full, updates, others)


def test_text_is_that_of_a_full_base() -> None:
    request = GenerationRequest(prompts=((1, 2, 3), (4, 5)), max_new_tokens=4)
    said = [
        [each.tokens for each in make_zo2(tiny_blueprint("llama"), BF16, base=base).generate(request)]
        for base in ("full", "lossless")
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_precisions_are_refused_in_a_line(dtype: Any) -> None:
    with pytest.raises(UserError, match=f"base=lossless: keeps bf16 .* in {dtype}.*--dtype bf16") as raised:
        Mezo(MezoSettings(base="lossless"), context(dtype=dtype))
    assert len(str(raised.value)) < 200


def test_it_is_exact_and_says_where_things_lie() -> None:
    lossless, full = (parse_settings("zo2", {"base": base}) for base in ("lossless", "full"))
    assert lossless.decides_updates == full.decides_updates
    assert not lossless.is_quantized
    assert approximation({"base": "lossless"}) is None
