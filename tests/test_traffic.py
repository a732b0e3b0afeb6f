"""What `engines.costs` predicts of traffic and pinned memory is what the engines count and hold.

The cost model sees a model as a `ModelShape`; the engines see its tensors. Here both look at one model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from engines import load_engine
from engines.base import Blueprint, Context, StepStats
from engines.costs.resources.traffic import Traffic
from engines.costs.table import traffic
from engines.settings.parse import parse_settings
from engines.shapes import Dtype, Workload
from engines.transfer import pinned
from harness.data.batches import make_data
from harness.models.blueprint import make_blueprint
from harness.models.configs import NAMED_SHAPES
from harness.records.job import make_job
from harness.resolve import resolve_shape
from tiny_models import SEQ_LEN, tiny_batches, tiny_blueprint

pytestmark = [
    pytest.mark.usefixtures("noise_drawn_once"),
    pytest.mark.filterwarnings("ignore::engines.offload.disk_files.PageCacheWarning"),  # wherever /tmp may be
]
FAMILIES = [
    ("opt", True), ("opt", False), ("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False),
    ("gpt2", True), ("gpt2", False), ("roberta", False), ("bert", False),
]  # fmt: skip
Method = tuple[str, dict[str, Any]]
METHODS: list[Method] = [
    ("native", {}),
    ("mezo", {}),
    ("zo2", {}),
    ("zo2", {"resident_blocks": 1}),
    ("zo2", {"fold_every": 2}),
    ("zo2", {"fold_every": 3, "resident_blocks": 1}),
    ("zo2", {"base": "int8", "fold_every": 2}),
    ("zo2", {"base": "int4", "resident_blocks": 1}),
    ("lsp", {"d": 4}),
    ("lsp", {"d": 512}),
]
VARIANTS: list[Method] = [
    *METHODS,
    ("zo2", {"resident_blocks": 3}),
    ("zo2", {"queries": 3, "fold_every": 2}),
    ("zo2", {"estimator": "lozo", "lozo_window": 1}),
    ("zo2", {"base": "int8", "estimator": "lozo", "lozo_window": 1}),
    ("zo2", {"estimator": "grzo", "noise": "rademacher", "grzo_window": 1}),
    ("zo2", {"base": "int4", "queries": 2, "fold_every": 2}),
    ("zo2", {"estimator": "fzoo", "noise": "rademacher", "queries": 4}),
    ("zo2", {"disk_blocks": 3}),
    ("zo2", {"disk_blocks": 3, "queries": 3}),
    ("zo2", {"disk_blocks": 1, "resident_blocks": 1}),
    ("zo2", {"disk_blocks": 2, "base": "int4", "queries": 2}),
    ("zo2", {"disk_blocks": 2, "estimator": "lozo", "lozo_window": 1}),
    ("lsp", {"d": 12}),
    ("lsp", {"d": 8, "schedule_order": "sequential"}),
    ("lsp", {"d": 8, "train_outer": False}),
    ("lsp", {"d": 8, "offload": False}),
]


def each_in_one_dtype(
    methods: Sequence[Method], families: Sequence[tuple[str, bool]]
) -> list[tuple[str, bool, str, dict[str, Any], Dtype]]:
    """Every method with every family. Of two dtypes each method meets both, and so does each family, tied or
    not: bytes are a count of elements, which these two decide, times an element's size."""
    dtypes: tuple[Dtype, Dtype] = ("fp32", "bf16")
    return [
        (*family, *method, dtypes[(number + (place + 1) // 2) % 2])
        for number, method in enumerate(methods)
        for place, family in enumerate(families)
    ]


@contextmanager
def running(
    engine: str, values: dict[str, Any], blueprint: Blueprint, workload: Workload, device: str = "cpu"
) -> Iterator[Any]:
    """The engine after its set-up."""
    if "disk_blocks" in values:
        values = {**values, "disk_folder": tempfile.gettempdir()}
    if engine == "lsp":
        values = {"r": 2, "learn_steps": 1, **values}
    context = Context(device=device, workload=workload, seed=0, total_steps=4)
    made = load_engine(engine)(parse_settings(engine, values), context)
    try:
        made.setup(blueprint)
        yield made
    finally:
        made.close()


def steps(made: Any, family: str, workload: Workload, count: int) -> list[StepStats]:
    """After a first one, in which no update is deferred yet."""
    batches = tiny_batches((1 + count) * workload.accumulation, family, batch_size=workload.batch_size)
    return [
        made.step(batches[i * workload.accumulation : (i + 1) * workload.accumulation])
        for i in range(1 + count)
    ][1:]


def assert_moved(all_stats: Sequence[StepStats], told: Traffic, values: dict[str, Any]) -> None:
    """Where blocks take turns in going down, the bytes of one turn are those of a model."""
    turn = values.get("fold_every", 1)
    assert {stats.h2d_bytes for stats in all_stats} == {told.h2d_bytes}
    assert {stats.disk_read_bytes for stats in all_stats} == {told.disk_bytes}
    downloads = [stats.d2h_bytes for stats in all_stats]
    assert len(downloads) >= turn
    sums = {sum(downloads[i : i + turn]) for i in range(len(downloads) - turn + 1)}
    if turn == 1:
        assert sums == {told.d2h_bytes}
    else:
        assert sums == {told.h2d_bytes}
        assert told.d2h_bytes == sum(layer.h2d_bytes // turn for layer in told.layers)


@pytest.mark.parametrize(
    ("family", "tied", "engine", "values", "dtype"), each_in_one_dtype(METHODS, FAMILIES), ids=str
)
def test_every_step_moves_what_the_cost_model_says(
    family: str, tied: bool, engine: str, values: dict[str, Any], dtype: Dtype
) -> None:
    blueprint = tiny_blueprint(family, tied)
    workload = Workload(batch_size=2, seq_len=SEQ_LEN, dtype=dtype, checkpointing=False)
    told = traffic(engine, blueprint.shape, workload, parse_settings(engine, values))
    with running(engine, values, blueprint, workload) as made:
        assert_moved(steps(made, family, workload, count=values.get("fold_every", 1) + 1), told, values)


@pytest.mark.parametrize(
    "values", [{"fold_every": 2}, {"train": "lora"}, {"resident_blocks": 1}, {"disk_blocks": 2, "queries": 2}]
)
def test_a_lossless_base_moves_what_the_cost_model_says(values: dict[str, Any]) -> None:
    blueprint, values = tiny_blueprint("llama"), {"base": "lossless", **values}
    workload = Workload(batch_size=2, seq_len=SEQ_LEN, dtype="bf16", checkpointing=False)
    told = traffic("zo2", blueprint.shape, workload, parse_settings("zo2", values))
    with running("zo2", values, blueprint, workload) as made:
        assert_moved(steps(made, "llama", workload, count=values.get("fold_every", 1) + 1), told, values)


@pytest.mark.parametrize("values", [{"queries": 4}, {"estimator": "1.5-spsa", "resident_blocks": 1}])
def test_hidden_states_move_what_the_cost_model_says(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.costs.zo2.STAYING_BYTES", 0)
    blueprint, values = tiny_blueprint("llama"), {"hidden_states": "host", **values}
    workload = Workload(batch_size=1, seq_len=SEQ_LEN, dtype="fp32", accumulation=2, checkpointing=False)
    told = traffic("zo2", blueprint.shape, workload, parse_settings("zo2", values))
    with running("zo2", values, blueprint, workload) as made:
        for stats in steps(made, "llama", workload, count=2):
            assert (stats.h2d_bytes, stats.d2h_bytes) == (told.h2d_bytes, told.d2h_bytes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("engine", "values"), VARIANTS, ids=lambda value: str(value))
def test_accumulation_and_checkpointing_move_no_more(
    engine: str, values: dict[str, Any], checkpointing: bool
) -> None:
    blueprint = tiny_blueprint("llama")
    workload = Workload(
        batch_size=1, seq_len=SEQ_LEN, accumulation=3, dtype="fp32", checkpointing=checkpointing
    )
    told = traffic(engine, blueprint.shape, workload, parse_settings(engine, values))
    with running(engine, values, blueprint, workload) as made:
        assert_moved(steps(made, "llama", workload, count=values.get("fold_every", 1)), told, values)


def test_some_methods_do_move_something() -> None:
    """Or all of the above would hold of a counter that never counts."""
    workload = Workload(batch_size=2, seq_len=SEQ_LEN, dtype="fp32")
    shape = tiny_blueprint("opt").shape
    zo2 = traffic("zo2", shape, workload, parse_settings("zo2", {}))
    assert zo2.h2d_bytes == 3 * 4 * shape.block_parameters
    lsp = traffic("lsp", shape, workload, parse_settings("lsp", {"d": 4}))
    assert lsp.h2d_bytes == 4 * 3 * len(shape.matrices) * 4 * 4
    assert lsp.d2h_bytes == lsp.h2d_bytes + 3 * 4


@pytest.mark.parametrize(
    ("family", "tied", "engine", "values", "dtype"),
    each_in_one_dtype(VARIANTS, [("opt", True), ("llama", False), ("gpt2", True), ("bert", False)]),
    ids=str,
)
def test_pinned_memory_is_what_the_cost_model_says(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    tied: bool,
    engine: str,
    values: dict[str, Any],
    dtype: Dtype,
) -> None:
    """A CPU pins nothing, so slabs are told here that they are pinned; their sizes are their own."""
    original = pinned.HostSlab.__init__

    def as_pinned(slab: Any, *args: Any, **kwargs: Any) -> None:
        original(slab, *args, **kwargs)
        slab.pinned = True

    monkeypatch.setattr(pinned.HostSlab, "__init__", as_pinned)
    blueprint = tiny_blueprint(family, tied)
    workload = Workload(batch_size=2, seq_len=SEQ_LEN, dtype=dtype)
    told = traffic(engine, blueprint.shape, workload, parse_settings(engine, values))
    with running(engine, values, blueprint, workload) as made:
        assert made.pinned_bytes == told.pinned_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "values"), VARIANTS, ids=lambda value: str(value))
def test_pinned_memory_and_traffic_on_a_gpu(engine: str, values: dict[str, Any], dtype: Dtype) -> None:
    blueprint = tiny_blueprint("llama")
    workload = Workload(batch_size=2, seq_len=SEQ_LEN, dtype=dtype, checkpointing=False)
    told = traffic(engine, blueprint.shape, workload, parse_settings(engine, values))
    with running(engine, values, blueprint, workload, "cuda:0") as made:
        assert_moved(steps(made, "llama", workload, count=4), told, values)
        assert made.pinned_bytes == told.pinned_bytes


@pytest.mark.parametrize("name", [name for name in NAMED_SHAPES if name.startswith("tiny-")])
@pytest.mark.parametrize(("engine", "values"), [("zo2", {}), ("lsp", {"d": 24, "r": 2, "learn_steps": 1})])
def test_the_closed_form_of_a_named_shape_counts_what_its_model_holds(
    name: str, engine: str, values: dict[str, Any]
) -> None:
    """Plans are made from the closed form alone, long before there is a model."""
    model = {"name": name, "random_weights": True}
    job = make_job({"model": model, "data": {"train": "random"}, "seq_len": 8, "dtype": "fp32"}, "test job")
    shape = resolve_shape(job)
    told = traffic(engine, shape, job.workload, parse_settings(engine, values))
    with running(engine, values, make_blueprint(job, shape), job.workload) as made:
        data = make_data(job, shape)
        _, stats = [made.step(data.step_batches(step)) for step in range(2)]
    assert_moved([stats], told, values)
