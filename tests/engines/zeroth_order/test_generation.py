from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engines.base import Context
from engines.decoding import GenerationRequest, Sampling
from engines.errors import InfeasiblePlan, UserError
from engines.methods.mezo import Mezo
from engines.methods.zo2 import Zo2
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from engines.shapes import Dtype, Workload
from engines.zeroth_order.generation import make_cache
from tiny_families import ENCODERS, FAMILIES, blueprint_of
from tiny_models import VOCABULARY, TinyBlueprint, tiny_batches, tiny_blueprint

DECODERS = ["opt", "llama", "qwen2", "gpt2"]
EVEN = ([5, 9, 23, 7], [8, 3, 40, 11], [30, 31, 5, 60])
UNEVEN = ([5, 9, 23, 7, 11, 13], [8], [30, 31, 5])
NEW_TOKENS = 12


def context(device: str = "cpu", dtype: Dtype = "fp32", vram_bytes: int | None = None) -> Context:
    workload = Workload(batch_size=2, seq_len=16, dtype=dtype)
    return Context(device=device, workload=workload, seed=7, total_steps=100, vram_bytes=vram_bytes)


def make_mezo(blueprint: TinyBlueprint, where: Context | None = None, **knobs: Any) -> Mezo:
    made = Mezo(MezoSettings(**knobs), where or context())
    made.setup(blueprint)
    return made


def make_zo2(blueprint: TinyBlueprint, where: Context | None = None, **knobs: Any) -> Zo2:
    made = Zo2(Zo2Settings(**knobs), where or context())
    made.setup(blueprint)
    return made


def sharpened(blueprint: TinyBlueprint) -> TinyBlueprint:
    """Matrices ten times as large: attention looks somewhere, and tokens differ."""
    for parameter in blueprint.reference.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)
    return blueprint


def sharp(family: str, tied: bool = False, num_blocks: int = 3) -> TinyBlueprint:
    return sharpened(tiny_blueprint(family, tied, num_blocks))


def tokens_of(engine: Mezo | Zo2, prompts: Sequence[Sequence[int]], **more: Any) -> list[list[int]]:
    """New tokens of each prompt."""
    request = GenerationRequest(prompts=prompts, **{"max_new_tokens": NEW_TOKENS, **more})
    steps = [decoded.tokens for decoded in engine.generate(request)]
    return [list(row) for row in zip(*steps, strict=True)]


def tokens_of_hugging_face(
    model: nn.Module, prompts: Sequence[Sequence[int]], end_ids: Sequence[int] = (), pad_id: int = 0
) -> list[list[int]]:
    """As `tokens_of`, by the plain model's own `generate`."""
    length = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    made = model.eval().generate(  # type: ignore[operator]
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, use_cache=True,
        max_new_tokens=NEW_TOKENS, eos_token_id=list(end_ids) or None, pad_token_id=pad_id,
    )  # fmt: skip
    return [list(row) for row in made[:, length:].tolist()]


@pytest.mark.parametrize("prompts", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_those_of_the_plain_model(family: str, tied: bool, prompts: Any) -> None:
    blueprint = sharp(family, tied)
    expected = tokens_of_hugging_face(blueprint.reference, prompts)
    assert len({token for row in expected for token in row}) > 4
    assert tokens_of(make_zo2(blueprint), prompts) == expected
    assert tokens_of(make_mezo(sharp(family, tied)), prompts) == expected


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ENCODERS])
def test_further_families_need_no_code_of_their_own(family: str) -> None:
    blueprint = sharpened(blueprint_of(family))
    streamed = make_zo2(blueprint)
    for prompts in (EVEN, UNEVEN):
        assert tokens_of(streamed, prompts) == tokens_of_hugging_face(blueprint.reference, prompts)


@pytest.mark.parametrize(
    ("num_blocks", "resident_blocks"), [(1, 0), (1, 1), (2, 0), (4, 1), (4, 3), (4, 4), (7, 2)]
)
def test_any_number_of_blocks_and_residents(num_blocks: int, resident_blocks: int) -> None:
    blueprint = sharp("llama", num_blocks=num_blocks)
    streamed = make_zo2(blueprint, resident_blocks=resident_blocks)
    expected = tokens_of_hugging_face(blueprint.reference, UNEVEN)
    assert tokens_of(streamed, UNEVEN) == expected
    assert tokens_of(streamed, EVEN) == tokens_of_hugging_face(blueprint.reference, EVEN)


SAMPLED = Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=5)


@pytest.mark.parametrize("family", DECODERS)
def test_zo2_and_mezo_draw_the_same_tokens(family: str) -> None:
    mezo, streamed = make_mezo(sharp(family)), make_zo2(sharp(family), resident_blocks=1)
    for prompts in (EVEN, UNEVEN):
        drawn = tokens_of(streamed, prompts, sampling=SAMPLED)
        assert drawn == tokens_of(mezo, prompts, sampling=SAMPLED)
        assert drawn == tokens_of(streamed, prompts, sampling=SAMPLED)
        other = Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=6)
        assert drawn != tokens_of(streamed, prompts, sampling=other)


@pytest.mark.parametrize("resident_blocks", [0, 2])
def test_blocks_on_disk_are_read_in_every_step_with_their_deferred_updates(resident_blocks: int) -> None:
    blueprint = sharp("llama", num_blocks=6)
    knobs = {"resident_blocks": resident_blocks, "disk_blocks": 2, "learning_rate": 1e-2}
    streamed = make_zo2(blueprint, **knobs)
    mezo = make_mezo(sharp("llama", num_blocks=6), learning_rate=1e-2)
    for batch in tiny_batches(3, "llama"):
        assert streamed.step([batch]).loss == mezo.step([batch]).loss
    request = GenerationRequest(prompts=UNEVEN, max_new_tokens=NEW_TOKENS)
    steps = list(streamed.generate(request))
    assert [step.tokens for step in steps] == [step.tokens for step in mezo.generate(request)]
    block_bytes = 4 * blueprint.shape.block_parameters
    told = {(step.stats.h2d_bytes, step.stats.disk_read_bytes) for step in steps[1:-1]}
    assert told == {((6 - resident_blocks) * block_bytes, 2 * block_bytes)}
    streamed.close()


def test_a_prompt_has_the_tokens_that_it_has_alone() -> None:
    streamed = make_zo2(sharp("opt"))
    together = tokens_of(streamed, UNEVEN)
    assert together == [row for prompt in UNEVEN for row in tokens_of(streamed, [prompt])]


@given(
    prompts=st.lists(
        st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=5
    ),
    resident_blocks=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_prompts_of_any_length_have_the_plain_models_tokens(
    prompts: list[list[int]], resident_blocks: int
) -> None:
    blueprint = sharp("gpt2")
    streamed = make_zo2(blueprint, resident_blocks=resident_blocks)
    assert tokens_of(streamed, prompts) == tokens_of_hugging_face(blueprint.reference, prompts)


def test_drawn_tokens_are_among_the_likeliest_and_as_often_as_is_due() -> None:
    """First tokens of 4000 equal prompts against the probabilities that the plain model gives."""
    blueprint = sharp("gpt2")
    with torch.no_grad():
        logits = blueprint.reference.eval()(torch.tensor([EVEN[0]])).logits[0, -1]
    count = 4000
    streamed = make_zo2(blueprint)

    def drawn(**how: Any) -> torch.Tensor:
        rows = tokens_of(streamed, [EVEN[0]] * count, max_new_tokens=1, sampling=Sampling(**how))
        return torch.bincount(torch.tensor(rows).view(-1), minlength=VOCABULARY) / count

    chances = (logits / 2.0).softmax(-1)
    assert (drawn(temperature=2.0) - chances).abs().max() < 4 * 0.5 / count**0.5
    likeliest = logits.topk(3).indices
    kept = torch.zeros(VOCABULARY).index_fill(0, likeliest, 1.0)
    share = drawn(temperature=2.0, top_k=3)
    assert (share - chances * kept / (chances * kept).sum()).abs().max() < 4 * 0.5 / count**0.5
    assert not (share * (1 - kept)).any()
    ordered = chances.sort(descending=True)
    needed = int((ordered.values.cumsum(0) < 0.5).sum()) + 1
    share = drawn(temperature=2.0, top_p=0.5)
    assert set(share.nonzero().view(-1).tolist()) <= set(ordered.indices[:needed].tolist())
    assert int((share > 0).sum()) == needed


def test_one_token_to_choose_from_is_the_greedy_one() -> None:
    streamed = make_zo2(sharp("llama"))
    greedy = tokens_of(streamed, UNEVEN)
    for how in ({"top_k": 1}, {"top_p": 1e-6}):
        assert tokens_of(streamed, UNEVEN, sampling=Sampling(temperature=5.0, **how)) == greedy


@pytest.mark.parametrize("family", DECODERS)
def test_an_end_token_ends_its_sequence_and_all_ends_end_the_generation(family: str) -> None:
    blueprint = sharp(family)
    streamed = make_zo2(blueprint)
    whole = tokens_of(streamed, UNEVEN)
    ends = [row[3 + index] for index, row in enumerate(whole)]
    expected = tokens_of_hugging_face(blueprint.reference, UNEVEN, end_ids=ends, pad_id=0)
    found = tokens_of(streamed, UNEVEN, end_ids=ends)
    assert found == expected
    assert len(found[0]) < NEW_TOKENS
    assert tokens_of(streamed, UNEVEN) == whole


def test_every_step_uploads_every_streamed_block_once() -> None:
    """One step is under way when the tokens of the one before are told: the first call holds two."""
    blueprint = sharp("opt", num_blocks=6)
    streamed = make_zo2(blueprint, resident_blocks=2)
    request = GenerationRequest(prompts=UNEVEN, max_new_tokens=8)
    counts = [decoded.stats.h2d_bytes for decoded in streamed.generate(request)]
    once = 4 * 4 * blueprint.shape.block_parameters
    assert counts[1:-1] == [once] * 6
    assert counts[-1] == 0  # nothing is left to start


@pytest.mark.parametrize(
    "knobs",
    [
        {}, {"fold_every": 3}, {"train": "last:1"}, {"train": "lora"},
        {"base": "int8", "fold_every": 3}, {"base": "int4", "fold_every": 3, "resident_blocks": 1},
        {"estimator": "lozo", "lozo_window": 3}, {"base": "int8", "estimator": "lozo", "lozo_window": 3},
        {"base": "int8", "queries": 2, "fold_every": 3},
        {"estimator": "grzo", "noise": "rademacher", "grzo_window": 3, "learning_rate": 1e-4},
    ],
)  # fmt: skip
def test_deferred_updates_are_in_what_generates_and_training_goes_on_as_if_it_had_not(knobs: Any) -> None:
    made = {"learning_rate": 1e-2, **knobs}
    blueprint = sharp("llama")
    streamed = make_zo2(blueprint, **made)
    alone = make_zo2(sharp("llama"), **made)
    low_bit = "base" in knobs
    only_zo2 = {"resident_blocks"} if low_bit else {"resident_blocks", "fold_every"}
    mezo = make_mezo(sharp("llama"), **{key: value for key, value in made.items() if key not in only_zo2})
    batches = tiny_batches(6, "llama")
    for batch in batches[:4]:
        for engine in (streamed, alone, mezo):
            engine.step([batch])
    before = tokens_of_hugging_face(blueprint.reference, UNEVEN)
    exported = sharp("llama").reference
    found, of_mezo = tokens_of(streamed, UNEVEN), tokens_of(mezo, UNEVEN)
    for name, weight in alone.weights():
        exported.get_parameter(name).data.copy_(weight)
    assert found == of_mezo == tokens_of_hugging_face(exported, UNEVEN)
    assert found != before
    for batch in batches[4:]:
        assert streamed.step([batch]).loss == alone.step([batch]).loss == mezo.step([batch]).loss
    for (name, weight), (_, other) in zip(streamed.weights(), alone.weights(), strict=True):
        assert torch.equal(weight, other), name


def test_a_lossless_base_generates_the_tokens_of_a_full_one_and_brings_up_its_own_bytes() -> None:
    """With updates that are deferred, and without."""
    where = context(dtype="bf16")
    full, lossless = (
        make_zo2(sharp("llama"), where, fold_every=3, learning_rate=1e-2, base=base)
        for base in ("full", "lossless")
    )
    for batch in tiny_batches(2, "llama"):
        assert full.step([batch]).loss == lossless.step([batch]).loss
        assert tokens_of(lossless, UNEVEN) == tokens_of(full, UNEVEN)
    request = GenerationRequest(prompts=EVEN, max_new_tokens=4)
    sizes = [lossless.blocks.stored(index, 1).numel() for index in range(3)]
    counts = [decoded.stats.h2d_bytes for decoded in lossless.generate(request)]
    assert counts[1:-1] == [sum(sizes)] * 2


def test_given_up_half_way_it_leaves_nothing_behind() -> None:
    streamed, mezo = make_zo2(sharp("gpt2")), make_mezo(sharp("gpt2"))
    steps = streamed.generate(GenerationRequest(prompts=EVEN, max_new_tokens=NEW_TOKENS))
    next(steps)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert tokens_of(streamed, EVEN) == tokens_of(mezo, EVEN)
    batch = tiny_batches(1, "gpt2")
    assert streamed.step(batch).loss == mezo.step(batch).loss


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_an_encoder_is_refused_in_one_line(family: str) -> None:
    with pytest.raises(UserError, match="is an encoder, which generates no text; use a decoder"):
        tokens_of(make_zo2(tiny_blueprint(family)), EVEN)


def test_a_head_without_vocabulary_is_refused() -> None:
    made = make_zo2(tiny_blueprint("llama", head="classification"))
    with pytest.raises(UserError, match="has no head over a vocabulary"):
        tokens_of(made, EVEN)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": []}, "a prompt must have a token"),
        ({"prompts": [[1], []]}, "a prompt must have a token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
    ],
)
def test_a_request_that_makes_no_sense(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationRequest(**{"prompts": [[1]], "max_new_tokens": 1, **values})


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_sampling_out_of_range(values: Any) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=name):
        Sampling(**values)


def test_the_cache_has_its_final_size_from_the_start() -> None:
    engine = make_zo2(blueprint_of("mistral"))
    cache = make_cache(engine._model, 3, 10, None)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 1, 4, 8)] * 2  # window of 4
    cache = make_cache(make_zo2(tiny_blueprint("opt"))._model, 3, 10, None)
    assert [tuple(layer.values.shape) for layer in cache.layers] == [(3, 2, 10, 8)] * 3


class Reads(TorchDispatchMode):
    """Operations whose result the host looks at, or whose size it has to wait for."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(look in name for look in self.LOOKS):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_host_reads_nothing_of_what_a_decoding_step_computes(family: str, prompts: Any) -> None:
    """But the tokens of the step before, by `tolist`, which is no operation."""
    streamed = make_zo2(sharp(family), resident_blocks=1)
    for sampling in (Sampling(), SAMPLED):
        steps = streamed.generate(
            GenerationRequest(prompts=prompts, max_new_tokens=6, end_ids=(1,), sampling=sampling)
        )
        next(steps)
        with Reads() as reads:
            next(steps)
            next(steps)
            assert reads.found == []
            torch.ones(1).item()
        assert reads.found == ["_local_scalar_dense"]  # it would have been seen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_zo2_and_mezo_agree_on_the_gpu(
    family: str, graphs: bool, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link held up at random, blocks in small chunks, between training steps."""
    monkeypatch.setattr("engines.offload.ring.UPLOAD_BYTES", 500)
    if not graphs:
        monkeypatch.setattr("engines.zeroth_order.perturbed_model.GRAPH_SCRATCH_BYTES", 0)
    where = context("cuda:0", dtype)
    delays = random.Random(0)
    mezo = make_mezo(sharp(family, num_blocks=7), where)
    streamed = Zo2(Zo2Settings(resident_blocks=1, fold_every=3), where)
    streamed.link_delay = lambda: delays.randrange(400_000)
    streamed.setup(sharp(family, num_blocks=7))
    for batch in tiny_batches(4, family):
        assert streamed.step([batch]).loss == mezo.step([batch]).loss
        for prompts in (EVEN, UNEVEN):
            for sampling in (Sampling(), SAMPLED):
                found = tokens_of(streamed, prompts, sampling=sampling)
                assert found == tokens_of(mezo, prompts, sampling=sampling)
    streamed.close()


@pytest.mark.gpu
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_on_the_gpu_are_those_of_the_plain_model(family: str) -> None:
    blueprint = sharp(family)
    expected = tokens_of_hugging_face(blueprint.reference, UNEVEN)
    assert tokens_of(make_zo2(blueprint, context("cuda:0")), UNEVEN) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Zo2, Mezo])
@pytest.mark.parametrize("prompts", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_host_waits_for_nothing_in_a_decoding_step(kind: Any, prompts: Any, family: str) -> None:
    """But for the event of the step before, of which torch's debug mode says nothing."""
    where = context("cuda:0", "bf16")
    engine = make_zo2(sharp(family), where) if kind is Zo2 else make_mezo(sharp(family), where)
    for sampling in (Sampling(), SAMPLED):
        request = GenerationRequest(
            prompts=prompts, max_new_tokens=NEW_TOKENS, end_ids=(VOCABULARY - 1,), sampling=sampling
        )
        steps = engine.generate(request)
        next(steps)
        next(steps)
        try:
            _debug_waits("error")
            next(steps)
            next(steps)
        finally:
            _debug_waits("default")
        steps.close()
    engine.close()


def _debug_waits(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
def test_a_cache_that_does_not_fit_is_refused_before_it_is_there() -> None:
    engine = make_zo2(tiny_blueprint("llama"), context("cuda:0", vram_bytes=100_000_000))
    before = torch.cuda.memory_allocated()
    request = GenerationRequest(prompts=[[3] * 50] * 100_000, max_new_tokens=10)
    with pytest.raises(InfeasiblePlan, match=r"the key-value cache of 100000 x 59 tokens takes 1\.13 GB"):
        next(iter(engine.generate(request)))
    assert torch.cuda.memory_allocated() - before < 100_000_000
    engine.close()
