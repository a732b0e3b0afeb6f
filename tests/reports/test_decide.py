from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import UserError
from harness.records.comparison import beside_native
from harness.records.run import EndState, Run
from reports.criteria import (
    ANY_METHOD,
    METRICS,
    Comparator,
    Criteria,
    Criterion,
    Level,
    Metric,
    default_criteria,
    init_text,
    parse_criteria,
)
from reports.decide import JudgedCriterion, Verdict, decide, exit_code, parse_fail_on, state_of
from reports.judging import stated
from reports.judging.quality import learned, learned_text
from reports.judging.ranking import Standing, beaten_by, beats, is_faster, quality
from reports.judging.untried import Untried, to_try
from reports.measured.measurements import group
from reports.measured.metrics import find
from reports.question import JobSize
from reports.tables.methods import rare_notes
from run_records import (
    emulated_run,
    make_environment,
    make_failures,
    make_machine,
    make_run,
    make_sweep,
    make_test_job,
    scaled,
)


def criterion(
    metric: Metric = "step_s",
    threshold: float = 2.0,
    *,
    engine: str = "zo2",
    comparison: Comparator = "at most",
    level: Level = "must",
) -> Criterion:
    return Criterion(
        id=f"{metric} {engine} {comparison} {threshold} {level}", metric=metric, engine=engine,
        comparison=comparison, threshold=threshold, level=level, why="because",
    )  # fmt: skip


def criteria(*all_: Criterion) -> Criteria:
    return Criteria(criteria=all_, sha256="a" * 64)


def one(metric: Metric, runs: list[Run], engine: str = "zo2", threshold: float = 2.0) -> JudgedCriterion:
    return decide(runs, criteria(criterion(metric, threshold, engine=engine)), make_machine()).rows[0]


# Strategies: sweeps of a few runs of any end, and criteria of any kind on them.
END_STATES: tuple[EndState, ...] = get_args(EndState)
run_specs = st.lists(
    st.tuples(
        st.sampled_from(["native", "lsp", "zo2", "mezo"]),
        st.sampled_from([*END_STATES, "ok", "ok", "ok"]),
        st.sampled_from([0.5, 1.0, 1.05, 4.0]),
    ),
    max_size=7,
)
all_criteria = st.lists(
    st.builds(
        criterion,
        st.sampled_from(list(METRICS)),
        st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0, 30.0]),
        engine=st.sampled_from([ANY_METHOD, "zo2", "lsp", "native"]),
        comparison=st.sampled_from(get_args(Comparator)),
        level=st.sampled_from(get_args(Level)),
    ),
    max_size=5,
).map(lambda found: criteria(*found))


def build(specs: list[tuple[str, EndState, float]]) -> list[Run]:
    return [
        make_run(engine, round=i + 1, end_state=end, step_s=scaled(factor))
        for i, (engine, end, factor) in enumerate(specs)
    ]


@settings(max_examples=60, deadline=None)
@given(run_specs, all_criteria)
def test_the_verdict_follows_from_the_rows(specs: list[tuple[str, EndState, float]], asked: Criteria) -> None:
    verdict = decide(build(specs), asked)
    musts = [row.outcome for row in verdict.rows if row.level == "must"]
    wants = [row.outcome for row in verdict.rows if row.level == "want"]
    assert len(verdict.rows) == len(asked.criteria)
    if verdict.state in ("GO", "CONDITIONAL GO"):
        assert set(musts) <= {"pass", "not applicable"}
        assert "pass" in musts
    if "fail" in musts:
        assert verdict.state == "NO-GO"
    elif "unknown" in musts:
        assert verdict.state == "INCONCLUSIVE"
    elif verdict.state == "GO":
        assert set(wants) <= {"pass", "not applicable"}
    elif verdict.state == "CONDITIONAL GO":
        assert {"fail", "unknown"} & set(wants)
    for row in verdict.rows:
        assert (row.outcome in ("pass", "fail")) <= (row.measured is not None)
        assert (row.outcome in ("unknown", "not applicable")) <= bool(row.note)
    assert verdict.sentence.endswith(".")
    assert "{" not in verdict.sentence


@settings(max_examples=40, deadline=None)
@given(run_specs, all_criteria, st.randoms(use_true_random=False))
def test_the_order_of_runs_does_not_matter(
    specs: list[tuple[str, EndState, float]], asked: Criteria, random: object
) -> None:
    runs = build(specs)
    shuffled = list(runs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide(shuffled, asked) == decide(runs, asked)


@settings(max_examples=40, deadline=None)
@given(run_specs, all_criteria)
def test_one_more_must_never_makes_the_verdict_better(
    specs: list[tuple[str, EndState, float]], asked: Criteria
) -> None:
    runs = build(specs)
    best_first = ("GO", "CONDITIONAL GO", "INCONCLUSIVE", "NO-GO")
    musts = [c for c in asked.criteria if c.level == "must"]
    for count in range(1, len(musts)):
        fewer = decide(runs, criteria(*musts[:count])).state
        more = decide(runs, criteria(*musts[: count + 1])).state
        # With nothing judged the verdict is INCONCLUSIVE, from where a first pass may lead up.
        if any(row.outcome == "pass" for row in decide(runs, criteria(*musts[:count])).rows):
            assert best_first.index(fewer) <= best_first.index(more)


@pytest.mark.parametrize(
    ("musts", "wants", "state"),
    [
        (["pass"], [], "GO"),
        (["pass", "not applicable"], ["pass"], "GO"),
        (["pass"], ["fail"], "CONDITIONAL GO"),
        (["pass"], ["unknown"], "CONDITIONAL GO"),
        (["pass", "unknown"], ["pass"], "INCONCLUSIVE"),
        (["unknown", "fail"], ["pass"], "NO-GO"),
        (["pass", "fail"], [], "NO-GO"),
        (["not applicable"], ["pass"], "INCONCLUSIVE"),
        ([], ["pass"], "INCONCLUSIVE"),
        ([], [], "INCONCLUSIVE"),
    ],
)
def test_table_of_states(musts: list[str], wants: list[str], state: str) -> None:
    template = one("step_s", [make_run()])
    levels = [*itertools.product(["must"], musts), *itertools.product(["want"], wants)]
    rows = [replace(template, level=level, outcome=outcome) for level, outcome in levels]  # type: ignore[arg-type]
    assert state_of(rows) == state


def test_defaults_on_a_good_sweep() -> None:
    verdict = decide(make_sweep(), default_criteria(), make_machine())
    assert verdict.state == "GO"
    assert verdict.method == "native"
    states = [(m.engine, m.state) for m in verdict.methods]
    assert states[:3] == [("native", "GO"), ("lsp", "GO"), ("zo2", "GO")]
    assert ("mezo", "NO-GO") in states
    assert verdict.sentence == "Use native: 505 and 510 ms per step, 20.0 GiB of GPU memory reserved."
    assert verdict.rows[0].evidence == ("native-r1", "native-r2")
    without = decide(
        [run for run in make_sweep() if run.engine != "native"], default_criteria(), make_machine()
    )
    assert (without.state, without.method) == ("CONDITIONAL GO", "lsp")
    assert without.next_command.startswith("lspzo-bench compare --job job.toml --engines native --rounds 3")


def test_defaults_where_all_failed_or_no_gpu_was_there() -> None:
    failed = decide([run for run in make_failures() if run.engine != "zo2"], default_criteria())
    assert failed.state == "NO-GO"
    assert "0 %" in failed.sentence
    assert "No method that was run will do. native comes nearest" in failed.sentence
    no_gpu = make_environment(gpu_name=None, gpu_driver=None, gpu_total_bytes=None, link=None)
    cpu_only = decide(
        [make_run(environment=no_gpu, peak_gpu_reserved_bytes=None, peak_gpu_allocated_bytes=None)],
        default_criteria(),
    )
    assert cpu_only.state == "CONDITIONAL GO"
    assert cpu_only.method == "zo2"
    assert {row.metric: row.outcome for row in cpu_only.rows}["gpu_memory_share"] == "not applicable"
    assert "native was not measured" in cpu_only.sentence


def test_two_halves_of_two_methods_do_not_make_a_go() -> None:
    runs = [
        make_run("lsp", step_s=scaled(1.0), peak_gpu_reserved_bytes=20 * 2**30),
        make_run("zo2", step_s=scaled(9.0), peak_gpu_reserved_bytes=2 * 2**30),
    ]
    fast = criterion("step_s", 2.0, engine=ANY_METHOD)
    small = criterion("gpu_memory_gib", 4.0, engine=ANY_METHOD)
    assert decide(runs, criteria(fast)).method == "lsp"
    assert decide(runs, criteria(small)).method == "zo2"
    assert decide(runs, criteria(fast, small)).state == "NO-GO"
    # A method that could not be tried may still be the one: not decided.
    untried = [runs[0], make_run("zo2", end_state="not_available")]
    assert decide(untried, criteria(small)).state == "INCONCLUSIVE"


def test_what_needs_a_gpu_is_no_answer_where_there_is_none() -> None:
    here = make_environment(gpu_name=None, gpu_driver=None, gpu_total_bytes=None, link=None)
    runs = [
        make_run("native", environment=here, end_state="timeout"),
        make_run("torchao-offload", environment=here, end_state="not_available"),
    ]
    verdict = decide(runs, criteria(criterion("runs_ok", 1.0, comparison="at least", engine=ANY_METHOD)))
    assert verdict.method == "native"
    assert verdict.state == "NO-GO"
    assert "torchao" not in verdict.next_command


def test_runs_on_both_sides_of_the_threshold_are_unknown() -> None:
    runs = [make_run(round=1, step_s=scaled(1.9)), make_run(round=2, step_s=scaled(2.1))]
    row = one("step_s", runs)
    assert row.outcome == "unknown"
    assert (row.measured, row.measured_low, row.measured_high) == pytest.approx((2.0, 1.9, 2.1))
    # A peak is a peak: the largest run decides.
    peaks = [make_run(round=i, peak_host_bytes=i * 2**30) for i in (1, 3)]
    assert one("host_memory_gib", peaks).outcome == "fail"
    assert one("host_memory_gib", peaks).measured == 3.0


def test_values_and_predictions_of_each_metric() -> None:
    runs = make_sweep()
    expected: dict[Metric, tuple[float, float | None]] = {
        "runs_ok": (1.0, 1.0),
        "step_s": (1.6 * 1.015, 1.5),
        "step_time_ratio": (3.2, 1.5 / 0.45),
        "tokens_per_s": (1024 / (1.6 * 1.015), 1024 / 1.5),
        "gpu_memory_share": (0.25, 0.25),
        "gpu_memory_gib": (6e9 / 2**30, 6e9 / 2**30),
        "host_memory_share": (31 / 128, 30 / 128),
        "host_memory_gib": (31e9 / 2**30, 30e9 / 2**30),
        "loss_change": (2.45 - 2.95, None),
        "prediction_factor": (1.6 * 1.015 / 1.5, None),
    }
    for metric, (measured, predicted) in expected.items():
        row = one(metric, runs)
        assert row.measured == pytest.approx(measured), metric
        assert row.predicted == (None if predicted is None else pytest.approx(predicted)), metric
    assert one("accuracy", [make_run(job=REAL)]).note == "the job has no evaluation"
    with_evaluation = [make_run(job=REAL, eval_accuracy_last=0.875)]
    assert one("accuracy", with_evaluation).measured == 0.875


def test_memory_is_judged_against_the_limit_else_the_gpu() -> None:
    unlimited = make_test_job(limits={})
    run = make_run(job=unlimited, peak_gpu_reserved_bytes=25_757_220_864)
    assert one("gpu_memory_share", [run]).measured == 1.0
    limited = make_test_job(limits={"host_bytes": 62_000_000_000})
    assert one("host_memory_share", [make_run(job=limited)]).measured == 0.5


def test_memory_is_judged_against_what_an_emulation_held() -> None:
    """Not against the card that ran, nor against a job's limit that is larger."""
    held = emulated_run(vram_bytes=4 * 10**9, vram_bytes_held=3 * 10**9)
    assert one("gpu_memory_share", [held]).measured == 2.0
    assert one("gpu_memory_share", [held]).outcome == "pass"
    assert one("gpu_memory_share", [held], threshold=1.0).outcome == "fail"
    # Asked for and not measured, as of a run that did not begin: the smaller of it and the job's limit.
    assert one("gpu_memory_share", [emulated_run(vram_bytes=4 * 10**9)]).measured == 1.5
    small = make_test_job(limits={"vram_bytes": 2 * 10**9})
    assert one("gpu_memory_share", [emulated_run(vram_bytes=4 * 10**9, job=small)]).measured == 3.0


def test_speed_beside_native_is_not_judged_on_an_emulated_machine() -> None:
    """What is measured is shown; the GPU's speed, which it hangs on, is that of the machine that ran."""
    runs = [emulated_run("zo2", step_s=scaled(9.0)), emulated_run("native", step_s=scaled(1.0))]
    row = one("step_time_ratio", runs)
    assert (row.outcome, row.measured) == ("not applicable", pytest.approx(9.0))
    assert row.note == "the GPU's speed is not that of the emulated machine"
    verdict = decide(runs, default_criteria(), make_machine())
    assert verdict.state == "GO"
    # The time in the sentence is the one predicted for the machine emulated.
    assert verdict.sentence == "Use native: 1.00 s (predicted) per step, 5.59 GiB of GPU memory reserved."
    asked = criteria(criterion("step_s", 100.0, engine=ANY_METHOD))
    assert decide(runs, asked).state == "INCONCLUSIVE"
    assert decide(runs, asked).next_command.startswith("lspzo-bench compare --job job.toml --out measured")


@pytest.mark.parametrize("losses", [(3.0, 2.0), (2.0, 3.0)])
def test_learning_is_not_judged_on_random_data(losses: tuple[float, float]) -> None:
    """Neither for nor against, nor between methods: their loss changes by chance."""
    job = make_test_job(data={"train": "random"})
    slow = make_run("lsp", job=job, losses=losses, step_s=scaled(2.0))
    runs = [slow, make_run("zo2", job=job, losses=losses[::-1])]
    row = one("loss_change", runs, threshold=0.0)
    assert (row.outcome, row.measured) == ("not applicable", None)
    assert row.note == "the training data are random, so nothing can be learned from them"
    verdict = decide(runs, default_criteria(), make_machine())
    assert [row.outcome for row in verdict.rows if row.metric == "loss_change"] == ["not applicable"]
    assert verdict.method == "lsp"  # a step with gradients before one without, where nothing was learned
    asked = criteria(criterion(), criterion("loss_change", 0.0, level="want"))
    assert decide([make_run(job=job)], asked).state == "GO"


def test_a_go_without_a_step_time_counts_what_was_passed() -> None:
    job = make_test_job(data={"train": "random"})
    untimed = replace(make_run(job=job), samples=())
    asked = criteria(criterion("runs_ok", 0.5, comparison="at least"), criterion("loss_change", 0.0))
    assert "every criterion that applies, 1 of 1" in decide([untimed], asked).sentence


@pytest.mark.parametrize(
    ("native", "outcome", "note"),
    [
        ("oom_gpu", "not applicable", "native does not fit"),
        ("skipped_infeasible", "not applicable", "predicted not to fit"),
        ("crash", "unknown", "native was not measured"),
        ("not_available", "unknown", "native was not measured"),
    ],
)
def test_ratio_to_a_native_that_is_not_there(native: EndState, outcome: str, note: str) -> None:
    row = one("step_time_ratio", [make_run(), make_run("native", end_state=native)])
    assert row.outcome == outcome
    assert row.note is not None
    assert note in row.note


def test_runs_that_were_stopped_from_outside_say_nothing() -> None:
    stopped = [make_run(end_state="interrupted"), make_run(round=2, end_state="not_available")]
    assert one("runs_ok", stopped, threshold=1.0).outcome == "unknown"
    assert one("runs_ok", [*stopped, make_run(round=3)], threshold=1.0).measured == 1.0
    assert one("runs_ok", [make_run(end_state="nan_loss")]).measured == 0.0


def test_no_criteria_is_never_a_go() -> None:
    verdict = decide(make_sweep(), None)
    assert (verdict.state, verdict.rows, verdict.method) == ("INCONCLUSIVE", (), None)


def test_exit_codes() -> None:
    def verdict_of(musts: list[Criterion]) -> Verdict:
        return decide([make_run()], criteria(*musts))

    go = verdict_of([criterion()])
    no_go = verdict_of([criterion(threshold=0.1)])
    conditional = verdict_of([criterion(), criterion(threshold=0.1, level="want")])
    inconclusive = verdict_of([criterion("accuracy")])
    every = parse_fail_on("no-go, conditional,INCONCLUSIVE")
    assert [exit_code(v, every) for v in (go, no_go, conditional, inconclusive)] == [0, 3, 4, 5]
    assert [exit_code(v, parse_fail_on(None)) for v in (go, no_go, conditional, inconclusive)] == [0] * 4
    assert exit_code(conditional, parse_fail_on("no-go")) == 0
    with pytest.raises(UserError, match="choose from: no-go, conditional, inconclusive"):
        parse_fail_on("nogo")


REAL = make_test_job(model={"name": "opt-1.3b"})
"""Of weights that are not random, so that losses tell something."""
SPEEDS = st.sampled_from([0.5, 0.52, 1.0, 4.0])
MEMORIES = st.sampled_from([4, 8, 16])
LOSSES = st.sampled_from([None, 1.0, 1.01, 1.5])
METHODS = ["native", "lora", "lsp", "zo2", "exact-offload"]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(METHODS), st.tuples(SPEEDS, MEMORIES, LOSSES), min_size=1))
def test_no_go_for_a_method_that_another_beats(
    measured: dict[str, tuple[float, int, float | None]],
) -> None:
    """In time, memory and quality."""
    runs = [
        make_run(
            engine, job=REAL, step_s=scaled(step_s), peak_gpu_reserved_bytes=gib * 2**30,
            peak_gpu_allocated_bytes=gib * 2**30, eval_loss_first=2.0, eval_loss_last=loss,
        )
        for engine, (step_s, gib, loss) in measured.items()
    ]  # fmt: skip
    verdict = decide(runs, default_criteria(), make_machine())
    assert verdict.method is not None
    states = {each.engine: each.state for each in verdict.methods}
    step_s, gib, loss = measured[verdict.method]
    best_first = ("GO", "CONDITIONAL GO", "INCONCLUSIVE", "NO-GO")
    for other, (other_s, other_gib, other_loss) in measured.items():
        better = other_s * 1.2 < step_s and other_gib < gib
        better = better and loss is not None and other_loss is not None and other_loss < loss
        as_good = best_first.index(states[other]) <= best_first.index(verdict.state)
        assert not (better and as_good), (verdict.method, other)
        beaten = next(each.beaten_by for each in verdict.methods if each.engine == other)
        assert beaten is None or states[beaten] in ("GO", "CONDITIONAL GO")
    assert next(each.beaten_by for each in verdict.methods if each.engine == verdict.method) is None


def test_quality_decides_before_time_and_time_before_memory() -> None:
    def run(engine: str, step_s: float, gib: int, loss: float | None) -> Run:
        return make_run(
            engine, job=REAL, step_s=scaled(step_s), peak_gpu_reserved_bytes=gib * 2**30, eval_loss_first=2.0,
            eval_loss_last=loss,
        )  # fmt: skip

    def chosen(*runs: Run) -> str | None:
        return decide(runs, default_criteria(), make_machine()).method

    native, lora = run("native", 1.0, 16, 1.0), run("lora", 0.5, 8, 1.01)
    assert chosen(native, lora) == "lora"  # as good, and faster
    assert chosen(native, run("lora", 0.5, 8, 1.1)) == "native"
    assert chosen(native, run("lsp", 0.5, 8, None)) == "native"  # its quality is not known
    assert chosen(native, run("lsp", 1.02, 8, 1.0)) == "native"  # a tie in time: what most people would use
    assert chosen(run("exact-offload", 1.02, 8, 1.0), run("lsp", 1.0, 4, 1.0)) == "lsp"
    assert chosen(run("zo2", 0.1, 2, None), run("exact-offload", 5.0, 8, None)) == "exact-offload"


@pytest.mark.parametrize(
    ("before", "native", "other", "chosen", "told"),
    [
        (0.700, 0.690, 0.700, "native", False),  # no better than the model was, and within 2 % of native
        (0.700, 0.710, 0.699, "native", False),  # better by chance
        (3.00, 2.85, 2.90, "native", True),  # within 2 %, with two thirds of native's gain
        (3.00, 2.85, 2.86, "mezo", True),  # as good, and faster
        (3.00, 2.85, 2.80, "mezo", True),
    ],
)
def test_losses_that_no_step_moved_tell_nothing(
    before: float, native: float, other: float, chosen: str, told: bool
) -> None:
    runs = [
        make_run(
            engine, round=round, job=REAL, step_s=scaled(step_s), peak_gpu_reserved_bytes=gib * 2**30,
            eval_loss_first=before, eval_loss_last=loss,
        )
        for engine, step_s, gib, loss in (("native", 1.0, 16, native), ("mezo", 0.4, 6, other))
        for round in (1, 2, 3)
    ]  # fmt: skip
    verdict = decide(runs, default_criteria(), make_machine())
    assert verdict.method == chosen
    assert any("too few steps to tell" in warning for warning in verdict.warnings) is not told
    assert verdict.methods[1].beaten_by == (chosen if told and chosen == "mezo" and other < native else None)


def test_training_less_in_less_time_is_no_answer_without_quality_and_says_so() -> None:
    native, lora = make_run("native"), make_run("lora", step_s=scaled(0.25), peak_gpu_reserved_bytes=2**30)
    exact = make_run("exact-offload", step_s=scaled(2.0), peak_gpu_reserved_bytes=2**29)
    asked, machine = default_criteria(), make_machine()
    both = decide([native, lora, exact], asked, machine)
    assert [each.engine for each in both.methods] == ["native", "lora", "exact-offload"]
    assert "not measured" not in both.sentence
    lora_first = decide([lora, exact], criteria(criterion("runs_ok", 1.0, engine=ANY_METHOD,
                                                          comparison="at least")), machine)  # fmt: skip
    assert lora_first.method == "lora"
    assert lora_first.sentence.endswith(
        "It trains adapters, and a head that is new: how good that gets beside training all weights was not "
        "measured."
    )
    zeroth = decide([make_run("zo2")], criteria(criterion("step_s", 9.0, engine=ANY_METHOD)), machine)
    assert zeroth.sentence.endswith("how many steps it needs and how good it gets were not measured.")


@pytest.mark.parametrize(
    ("asked", "run", "command"),
    [
        ("accuracy", make_run("lsp", job=REAL), "--eval-batches 16 --engines lsp --out evaluated"),
        ("step_time_ratio", make_run("lsp"), "--engines native --rounds 3 --out . --resume"),
        (
            "runs_ok",
            make_run("qlora", end_state="not_available"),
            "pip install 'lspzo-bench[lora,bitsandbytes]' && ",
        ),
    ],
)
def test_what_is_not_known_comes_with_the_command_that_tells_it(
    asked: Metric, run: Run, command: str
) -> None:
    verdict = decide([run], criteria(criterion(asked, engine=ANY_METHOD)))
    assert verdict.state == "INCONCLUSIVE"
    assert command in verdict.next_command


@pytest.mark.parametrize("asked", ["step_s", "step_time_ratio"])
def test_a_limit_that_every_run_reached_is_not_asked_for_again(asked: Metric) -> None:
    """The folder keeps its limit, so that the job is run in another with one that is much longer."""

    def late(engine: str, end_state: EndState = "timeout") -> Run:
        run = make_run(engine, end_state=end_state)
        return replace(run, job={**run.job, "limits": {"timeout_s": 3.0}})

    sought = criteria(criterion(asked, engine=ANY_METHOD))
    verdict = decide([late("native"), late("lora")], sought)
    longer = "lspzo-bench compare --job job.toml --timeout 30 --engines native,lora --out longer"
    assert verdict.next_command.startswith(longer)
    # One that ended in time says that the limit is not too short for the method.
    mixed = decide([late("native"), late("native", "ok"), late("lora")], sought)
    assert "--timeout" not in mixed.next_command


@pytest.mark.parametrize("metric", ["accuracy", "heldout_change", "heldout_ratio"])
def test_quality_of_random_weights_is_not_known(metric: Metric) -> None:
    """However much of it was measured: it is not that of the real model. No command here tells it."""
    runs = [
        make_run(engine, eval_loss_first=9.0, eval_loss_last=1.0, eval_accuracy_last=0.9)
        for engine in ("native", "lora")
    ]
    asked = criteria(criterion(metric, 99.0, engine=ANY_METHOD))
    verdict = decide(runs, asked, make_machine())
    assert (verdict.state, verdict.next_command) == ("INCONCLUSIVE", "")
    assert "the weights are random" in verdict.sentence
    real = [replace(run, model=replace(run.model, random_weights=False)) for run in runs]
    assert decide(real, asked, make_machine()).state == "GO"


def test_a_method_that_refuses_the_precision_is_tried_in_another_and_beside_the_rest() -> None:
    """Runs of two precisions are not compared, so that only both in one can tell the ratio."""
    untried = Untried(first=("native", "lora"), refusing=("native",))
    verdict = decide([make_run("zo2")], criteria(criterion("step_time_ratio")), make_machine(), untried)
    assert "--dtype bf16 --engines native,zo2 --out bf16 && lspzo-bench report bf16" in verdict.next_command
    assert to_try("native", untried).startswith(
        "lspzo-bench compare --job job.toml --dtype bf16 --engines native --out native &&"
    )
    assert "--resume" in to_try("lora", untried)


def test_where_native_is_predicted_not_to_fit_nothing_is_missing() -> None:
    untried = Untried(yardstick_is_out="needs 900 GiB of GPU memory, 22 GiB are usable")
    verdict = decide([make_run("zo2")], default_criteria(), make_machine(), untried)
    assert (verdict.state, verdict.method, verdict.next_command) == ("GO", "zo2", "")
    assert "native is predicted not to fit and was not run" in verdict.sentence


def test_hours_count_what_one_step_in_many_does() -> None:
    asked = parse_criteria(init_text("cost").encode(), "cost")
    run = make_run("galore", step_s=scaled(2.0))  # its first step took 10 s
    rare = replace(run.predicted, rare_s=6.0, rare_every=100) if run.predicted else None
    every = decide([replace(run, predicted=rare)], asked, make_machine())
    found = {row.metric: row for row in every.rows}["job_hours"]
    assert found.measured == pytest.approx((15000 * 2.0 + 150 * (10.0 - 2.0)) / 3600)
    compiled = replace(run, predicted=rare, summary=replace(run.summary, compile_s=3.0))
    found = {row.metric: row for row in decide([compiled], asked, make_machine()).rows}["job_hours"]
    assert found.measured == pytest.approx((15000 * 2.0 + 150 * (10.0 - 2.0 - 3.0)) / 3600)


def test_the_same_memory_is_not_less_and_beats_nobody() -> None:
    runs = [
        make_run(engine, job=REAL, round=round_, step_s=scaled(step_s), peak_gpu_reserved_bytes=2**30,
                 eval_loss_first=2.0, eval_loss_last=loss)
        for round_ in (1, 2, 3)
        for engine, step_s, loss in (("lora", 1.0, 1.0), ("exact-offload", 4.0, 1.5))
    ]  # fmt: skip
    all_ = group(runs, make_machine())
    assert is_faster("lora", "exact-offload", all_)
    assert not beats("lora", "exact-offload", all_)
    smaller = [replace(run, summary=replace(run.summary, peak_gpu_reserved_bytes=2**29)) for run in runs[::2]]
    assert beats("lora", "exact-offload", group([*smaller, *runs[1::2]], make_machine()))


def test_of_runs_that_disagree_by_far_nobody_says_which_is_faster() -> None:
    """As the risks say of them; however far the other method is."""
    steps = [("lora", 1.0), ("lora", 2.0), ("exact-offload", 9.0), ("exact-offload", 9.0)]
    runs = [
        make_run(engine, job=REAL, round=number % 2 + 1, step_s=scaled(step_s), peak_gpu_reserved_bytes=size,
                 eval_loss_first=2.0, eval_loss_last=1.0)
        for number, (engine, step_s) in enumerate(steps) for size in (2**29 if engine == "lora" else 2**30,)
    ]  # fmt: skip
    assert not is_faster("lora", "exact-offload", group(runs, make_machine()))
    assert is_faster("lora", "exact-offload", group(runs[1:], make_machine()))


def test_a_method_with_a_worse_verdict_beats_nobody() -> None:
    """However fast and small it is, and however well it learns."""
    runs = [
        make_run(engine, job=REAL, round=round_, step_s=scaled(step_s), peak_gpu_reserved_bytes=gib * 2**30,
                 eval_loss_first=2.0, eval_loss_last=loss)
        for round_ in (1, 2, 3)
        for engine, step_s, gib, loss in (("lora", 1.0, 1, 1.0), ("exact-offload", 4.0, 2, 1.5))
    ]  # fmt: skip
    all_ = group(runs, make_machine())
    standings = [Standing(engine=engine, state="GO", missed=0) for engine in ("lora", "exact-offload")]
    assert beaten_by(standings, all_) == {"exact-offload": "lora"}
    standings[0] = replace(standings[0], state="NO-GO")
    assert beaten_by(standings, all_) == {}


def test_losses_of_random_weights_rank_nobody() -> None:
    runs = [
        make_run(engine, job=REAL, eval_loss_first=9.0, eval_loss_last=1.0) for engine in ("native", "lora")
    ]
    assert quality("lora", group(runs, make_machine())) == 1.0
    random = [replace(run, model=replace(run.model, random_weights=True)) for run in runs]
    assert quality("lora", group(random, make_machine())) is None


def test_what_no_median_shows_counts_where_methods_are_ranked_and_in_the_headline() -> None:
    """A step of 1 s and one in 4 of 5 s is no faster than steps of 1.5 s, however little memory it takes."""
    runs = []
    for round_ in (1, 2, 3):
        runs.append(make_run("backward-optimizer", round=round_, step_s=(1.5,) * 8))
        row = make_run("galore", round=round_, step_s=(1.0,) * 8, peak_gpu_reserved_bytes=10**9)
        assert row.predicted is not None
        runs.append(replace(row, predicted=replace(row.predicted, rare_s=40.0, rare_every=4)))
    all_ = group(runs, make_machine())
    assert all_.of("galore").lasting_step_s == 2.0
    assert is_faster("backward-optimizer", "galore", all_)
    assert not beats("galore", "backward-optimizer", all_)
    verdict = decide(runs, default_criteria(), make_machine())
    assert verdict.method == "backward-optimizer"
    assert all(each.beaten_by is None for each in verdict.methods)
    assert stated.job_s("galore", all_, 100).value == pytest.approx(200.0)
    beside = group(
        [*runs, *(make_run("native", round=each, step_s=(1.0,) * 8) for each in (1, 2, 3))], make_machine()
    )
    ratio = find("step_time_ratio", "galore", beside)
    expected = beside.of("galore").runs[0].predicted
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert expected is not None
    assert expected.step_s is not None
    assert ratio.predicted == pytest.approx((expected.step_s + 10.0) / expected.step_s)
    compared = beside_native(beside.of("galore"), beside.of("native"))
    assert compared is not None
    assert (compared.answer, compared.ratio) == ("slower", 2.0)
    (note,) = rare_notes(all_)
    assert "One step in 4 of galore takes 4.00 s more" in note
    assert "2.00 s on average" in note


def test_hours_and_cost_of_the_whole_job() -> None:
    text = init_text("cost").replace("power_w = 600 ", "power_w = 500 ")
    asked = parse_criteria(text.encode(), "cost")
    verdict = decide([make_run("native", step_s=scaled(2.0))], asked, make_machine())
    found = {row.metric: row for row in verdict.rows}
    # 10,000 examples three times over in batches of two, two seconds each, half a kilowatt at 30 yen.
    assert found["job_hours"].measured == pytest.approx(15000 * 2.0 / 3600)
    assert found["job_cost"].measured == pytest.approx(15000 * 2.0 / 3600 * 0.5 * 30)
    assert "8.33 h for the whole job" in verdict.sentence
    assert verdict.state == "GO"
    assert (
        one("job_hours", [make_run()]).note
        == "nobody said how much is to be trained ([job] in the criteria file)"
    )


def test_accuracy_is_judged_over_examples_where_that_says_less_than_the_runs() -> None:
    """22 of 32 in every run: the runs agree, and the next 32 examples need not."""
    asked = criterion("accuracy", 0.6, comparison="at least", engine="zo2")

    def judged(share: float, examples: int | None, *more: float) -> JudgedCriterion:
        shares = (share, share, share, *more)
        runs = [
            make_run(job=REAL, round=i, eval_accuracy_last=each, eval_examples=examples)
            for i, each in enumerate(shares, 1)
        ]
        return decide(runs, criteria(asked)).rows[0]

    few = judged(22 / 32, 32)
    assert (few.outcome, few.note) == ("unknown", "of 32 examples, which are too few to say")
    assert (few.measured_low, few.measured_high) == pytest.approx((0.514, 0.820), abs=5e-4)
    assert judged(0.6875, 872).outcome == "pass"
    assert judged(0.5, 872).outcome == "fail"
    wide = judged(0.6875, 872, 0.55)  # the runs say less than so many examples
    assert (wide.outcome, wide.measured_low) == ("unknown", 0.55)
    uncounted = judged(22 / 32, None)
    assert uncounted.outcome == "pass"
    assert uncounted.note == "how many examples it rests on is not known, so the range is over runs alone"


def test_accuracy_is_told_with_its_examples_and_what_guessing_has() -> None:
    measured = {
        "eval_accuracy_first": 0.5, "eval_accuracy_last": 22 / 32, "eval_examples": 32,
        "eval_majority_class": 18 / 32,
    }  # fmt: skip
    runs = [make_run("native", round=i, job=REAL, **measured) for i in (1, 2, 3)]
    told = "accuracy 68.8 % of 32 examples (95 %: 51.4 to 82.0 %)"
    verdict = decide(runs, default_criteria())
    assert told in verdict.sentence
    (warning,) = [each for each in verdict.warnings if each.startswith("Accuracy is not told apart")]
    assert "(56.2 %): native 68.8 % of 32 examples (95 %: 51.4 to 82.0 %)." in warning
    found = learned("native", group(runs, None))
    assert found is not None
    assert learned_text(found) == (
        f"{told} on held-out data; before training 50.0 %; the most frequent class alone 56.2 %"
    )
    many = [replace(run, summary=replace(run.summary, eval_examples=872)) for run in runs]
    assert not any("most frequent class" in each for each in decide(many, default_criteria()).warnings)


EASY_AND_HARD = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
"""Losses of eight held-out sequences of one label each."""


def evaluated(engine: str, last: Sequence[float], **changes: Any) -> list[Run]:
    return [
        make_run(
            engine, round=i, job=REAL, eval_loss_first=5.0, eval_loss_last=sum(last) / len(last),
            eval_sequence_labels=(1,) * len(last), eval_sequence_losses_first=(5.0,) * len(last),
            eval_sequence_losses_last=tuple(last), **changes,
        )
        for i in (1, 2, 3)
    ]  # fmt: skip


def test_a_criterion_on_loss_is_judged_over_sequences() -> None:
    """However well the runs agree; beside native sequence by sequence, so that hard ones are no noise."""
    native = evaluated("native", EASY_AND_HARD)
    half_worse = [each + 0.5 + 0.01 * each for each in EASY_AND_HARD]
    change = criterion("heldout_change", 0.0, comparison="less than", engine="native")
    ratio_ = criterion("heldout_ratio", 1.02, engine="zo2")
    few, worse = decide([*native, *evaluated("zo2", half_worse)], criteria(change, ratio_)).rows
    assert (few.outcome, few.note) == ("unknown", "of 8 held-out sequences, which are too few to say")
    assert few.measured == pytest.approx(-0.5)
    assert few.measured_low is not None
    assert few.measured_low < -2.0
    assert worse.outcome == "fail"
    assert worse.measured_low is not None
    assert worse.measured_low > 1.02

    before = [
        replace(run, summary=replace(run.summary, eval_sequence_labels=())) for run in (*native, *native)
    ]
    (kept,) = decide(before, criteria(change)).rows
    assert kept.outcome == "pass"
    assert kept.note == "losses of each held-out sequence are not known, so the range is over runs alone"


def test_of_losses_that_other_sequences_may_turn_around_neither_method_is_better() -> None:
    """Then time decides among methods of one kind, and no zeroth-order one comes first for it."""

    def chosen(other: str, differs: Callable[[int], float], than: str = "native") -> Verdict:
        losses = [each / 4 + differs(number) for number, each in enumerate(EASY_AND_HARD)]
        more = {"step_s": scaled(0.5), "peak_gpu_reserved_bytes": 2**29}
        best = evaluated(than, [each / 4 for each in EASY_AND_HARD], peak_gpu_reserved_bytes=2**30)
        return decide([*best, *evaluated(other, losses, **more)], default_criteria(), make_machine())

    def by_chance(number: int) -> float:
        return 0.3 if number % 2 else -0.1  # 0.1 more: 9 % of the loss

    def always(number: int) -> float:
        return 0.1 + 0.01 * (number % 2)

    assert chosen("exact-offload", always, than="torchao-offload").method == "torchao-offload"
    assert chosen("exact-offload", by_chance, than="torchao-offload").method == "exact-offload"
    for other in ("exact-offload", "mezo", "lora"):  # other than native, what most people would use
        assert chosen(other, by_chance).method == "native"
    better = chosen("mezo", lambda number: -always(number))
    assert better.method == "mezo"
    assert {each.engine: each.beaten_by for each in better.methods}["native"] == "mezo"
    unsure = chosen("exact-offload", lambda number: -by_chance(number))
    assert unsure.method == "exact-offload"  # it is faster
    assert {each.engine: each.beaten_by for each in unsure.methods}["native"] is None


def test_a_loss_is_told_beside_natives_on_the_same_sequences() -> None:
    def told(differs: Callable[[int], float]) -> str:
        losses = [each + differs(number) for number, each in enumerate(EASY_AND_HARD)]
        all_ = group([*evaluated("native", EASY_AND_HARD), *evaluated("lsp", losses)], None)
        found = learned("lsp", all_)
        assert found is not None
        return learned_text(found)

    assert told(lambda number: 0.1) == (
        "loss 4.6000 of 8 sequences (95 %: 2.5522 to 6.6478) on held-out data; before training 5.0000; "
        "native 4.5000, sequence by sequence +0.1000 (95 %: +0.1000; worse)"
    )
    assert told(lambda number: -0.2 + 0.1 * (number % 2)).endswith(
        "-0.1500 (95 %: -0.1947 to -0.1053; better)"
    )
    assert told(lambda number: (-1.0) ** number).endswith("undecided)")
    # The same sums in another order: '+0.0000 (95 %: +0.0000; worse)' was a contradiction.
    assert told(lambda number: 2.5e-7).endswith("+0.0000 (95 %: +0.0000; the same)")


def test_held_out_data_that_was_trained_on_is_warned_of() -> None:
    run = make_run("native", job=REAL, eval_accuracy_last=0.97, eval_examples=200)
    assert not any("training data too" in each for each in decide([run], default_criteria()).warnings)
    leaked = replace(run, summary=replace(run.summary, eval_in_training=180))
    (warning,) = [
        each for each in decide([leaked], default_criteria()).warnings if "training data too" in each
    ]
    assert warning.startswith("180 of the held-out sequences")


def test_a_deadline_is_not_missed_by_steps_that_were_padded() -> None:
    """1,000 steps of 1 s, of which 40 % of the tokens are no padding: 2.7 to 16.7 minutes as `run` pads."""
    rows = make_test_job(model={"name": "opt-1.3b"}, data={"train": "rows.tsv"}, seq_len=64)
    size = JobSize(steps=1000)

    def judged(minutes: float, **changes: Any) -> Verdict:
        runs = [
            make_run("native", round=i, job=replace(rows, **changes), step_s=(1.0,) * 4, padded_share=0.6)
            for i in (1, 2, 3)
        ]
        asked = criteria(criterion("job_hours", minutes / 60, engine=ANY_METHOD))
        return decide(runs, replace(asked, size=size))

    assert judged(17).rows[0].outcome == "pass"
    late = judged(10)
    assert (late.state, late.rows[0].outcome) == ("INCONCLUSIVE", "unknown")
    assert late.rows[0].note is not None
    assert late.rows[0].note.startswith("steps were padded to 64 tokens")
    assert "--padding longest" in late.next_command
    assert "--criteria criteria.toml" in late.next_command
    assert any("Every sequence was padded to 64 tokens, which is 60 %" in each for each in late.warnings)
    assert judged(2).rows[0].outcome == "fail"  # less than 0.4 squared of it
    as_run = judged(10, padding="longest")
    assert as_run.state == "NO-GO"
    assert not any("padded" in each for each in as_run.warnings)


@pytest.mark.parametrize(("metric", "threshold"), [("step_s", 1.05), ("tokens_per_s", 1000.0)])
def test_one_process_is_judged_by_the_range_of_its_steps(metric: Metric, threshold: float) -> None:
    """Its median, 1.0 s or 1,024 tokens a second, meets the threshold; steps of 0.9 to 1.1 s do not all."""
    comparison: Comparator = "at most" if metric == "step_s" else "at least"
    asked = criteria(criterion(metric, threshold, comparison=comparison))
    alone = decide([make_run()], asked).rows[0]
    assert (alone.outcome, alone.over_steps, alone.runs) == ("unknown", True, 1)
    assert alone.note is not None
    assert alone.note.startswith("of one process, undecided")
    assert alone.measured_low is not None
    assert alone.measured_high is not None
    assert alone.measured_high / alone.measured_low == pytest.approx(1.1 / 0.9)
    assert decide([make_run(round=i) for i in (1, 2, 3)], asked).rows[0].outcome == "pass"


def test_accuracy_that_training_lowered_is_said() -> None:
    def warned(last: float) -> bool:
        run = make_run("native", job=REAL, eval_accuracy_first=0.6875, eval_accuracy_last=last)
        told = "lower than before the first: native 68.8 % to 50.0 %."
        return any(told in each for each in decide([run], default_criteria()).warnings)

    assert warned(0.5)
    assert not warned(0.6875)
