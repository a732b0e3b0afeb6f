from __future__ import annotations

from dataclasses import replace

import pytest

from harness.records.run import Run
from profiles.language import speaking
from profiles.machine import Machine
from profiles.units import format_seconds
from reports.criteria import Criteria, default_criteria
from reports.measured.measurements import group
from reports.warnings import warnings
from run_records import (
    emulated_run,
    make_environment,
    make_machine,
    make_plan,
    make_run,
    make_test_job,
    scaled,
)

ASKED = Criteria(criteria=(), sha256="a" * 64)


def warnings_of(runs: list[Run], asked: Criteria | None, machine: Machine | None = None) -> str:
    return " | ".join(warnings(runs, asked, group(runs, machine)))


def test_warnings() -> None:
    stamped = [make_run(round=i, stamp=ASKED.sha256) for i in range(1, 6)]
    assert warnings_of(stamped, ASKED).startswith("Random weights")
    assert "No criteria stamped into 1 of 6" in warnings_of([*stamped, make_run(round=6)], ASKED)
    assert "Criteria set after measurement: 1 of 6" in warnings_of(
        [*stamped, make_run(round=6, stamp="b" * 64)], ASKED
    )
    assert "nothing to judge by" in warnings_of(stamped, None)
    assert "built-in defaults" in warnings_of(stamped, default_criteria())
    for changes, words in (
        ({"dirty": True}, "differed from its commit"),
        ({"commit": None}, "not known"),
        ({"platform": "Linux 6.6 WSL2"}, "WSL2"),
        ({"emulated": "rtx-4090"}, "emulated machine (rtx-4090)"),
        ({"notes": ("the processor is busy",)}, "Of the machine: the processor is busy."),
    ):
        runs = [make_run(environment=make_environment(**changes))]  # type: ignore[arg-type]
        assert words in warnings_of(runs, ASKED)
    other = make_run(round=2, environment=make_environment(commit="d" * 40))
    assert "2 different commits" in warnings_of([make_run(), other], ASKED)
    mixed = [make_run(), make_run(round=2, end_state="crash")]
    assert "zo2 1 ok, 1 crashed" in warnings_of(mixed, ASKED)
    traced = [make_run(), replace(make_run(round=2), traced=True)]
    assert "1 of 2 runs kept a trace" in warnings_of(traced, ASKED)
    assert "trace" not in warnings_of(stamped, ASKED)
    low_bit = replace(make_run(), plan=make_plan("zo2", settings={"base": "int4"}))
    assert "zo2: approximate: 4-bit base (int4)" in warnings_of([make_run(), low_bit], ASKED)
    assert "approximate" not in warnings_of(stamped, ASKED)


def test_a_reference_engine_that_fits_and_is_faster_is_said() -> None:
    words = "mezo, the same method as zo2 with nothing offloaded, also fits this GPU and is faster: 500 ms"
    zo2 = make_run("zo2")
    mezo = [make_run("mezo", step_s=scaled(0.5), round=i) for i in (1, 2, 3)]
    thrice = [make_run("zo2", round=i) for i in (1, 2, 3)]
    assert words in warnings_of([*thrice, *mezo], ASKED)
    assert words not in warnings_of([*thrice, *mezo[:2]], ASKED)
    assert "mezo" not in warnings_of([*thrice, *(make_run("mezo", round=i) for i in (1, 2, 3))], ASKED)
    assert "mezo" not in warnings_of([zo2, make_run("mezo", end_state="oom_gpu")], ASKED)
    # Nothing of the kind is shown by the speed of another GPU, or by that of none.
    emulated = [emulated_run("zo2"), emulated_run("mezo", step_s=scaled(0.5))]
    assert "mezo" not in warnings_of(emulated, ASKED)
    no_gpu = make_environment(gpu_name=None)
    without = [make_run("zo2", environment=no_gpu), make_run("mezo", step_s=scaled(0.5), environment=no_gpu)]
    assert "the same method as zo2" not in warnings_of(without, ASKED)


def test_offloading_that_saves_no_gpu_memory_is_said() -> None:
    native = make_run("native", peak_gpu_reserved_bytes=6 * 2**30)
    runs = [
        native,
        make_run("lsp", peak_gpu_reserved_bytes=6 * 2**30),
        make_run("zo2", peak_gpu_reserved_bytes=5 * 2**30),
        make_run("torchao-offload", peak_gpu_reserved_bytes=7 * 2**30),
        make_run("mezo", peak_gpu_reserved_bytes=8 * 2**30),
    ]
    told = "6.00 GiB of GPU memory, and these take no less: lsp 6.00 GiB, torchao-offload 7.00 GiB."
    assert told in warnings_of(runs, ASKED)
    assert "take no less" not in warnings_of([native, runs[2]], ASKED)


def test_a_card_that_would_be_too_small_for_all_in_use_is_said() -> None:
    small = make_test_job(limits={"vram_bytes": 4 * 2**30})
    runs = [make_run(job=small, round=i, peak_gpu_nvml_bytes=(3 + i) * 2**30) for i in (1, 2)]
    assert "exceeded the 4.00 GiB held to: zo2 5.00 GiB." in warnings_of(runs, ASKED)
    assert "held to" not in warnings_of(runs[:1], ASKED)
    # An emulated card holds CUDA's context beside what is emulated.
    free = make_test_job(limits={})
    for extra, warned in ((600_000_000, False), (600_000_001, True)):
        used = 4 * 2**30 + extra
        run = emulated_run(job=free, vram_bytes=4 * 2**30, peak_gpu_nvml_bytes=used)
        assert ("exceeded the 4.56 GiB held to" in warnings_of([run], ASKED)) == warned
    whole = make_run(job=free, peak_gpu_nvml_bytes=200 * 2**30)
    assert "held to" not in warnings_of([whole], ASKED)


def test_runs_that_were_disturbed_are_said() -> None:
    runs = [make_run(round=1, step_s=scaled(1.0)), make_run(round=2, step_s=scaled(1.6))]
    assert "more than a factor of 1.5 in their medians" in warnings_of(runs, ASKED)
    assert "took their time: zo2 1.00 to 1.60 s." in warnings_of(runs, ASKED)
    assert "their medians" not in warnings_of([runs[0], make_run(round=2, step_s=scaled(1.5))], ASKED)


def test_a_clock_that_was_held_is_said_in_both_languages() -> None:
    why = "the GPU's clock was held at 0.93 of 1.98 GHz in 80% of the time that it worked, by heat"
    runs = [replace(make_run(round=1), disturbance=why), make_run(round=2)]
    assert (
        f"1 of 2 runs were disturbed, and their times say more of that than of the method: zo2: {why}."
        in (warnings_of(runs, ASKED))
    )
    assert "were disturbed" not in warnings_of(runs[1:], ASKED)
    with speaking("ja"):
        assert "1.98 GHz 中 0.93 GHz に抑えられた。原因は発熱" in warnings_of(runs, ASKED)


def test_a_step_outside_its_predicted_range_is_said() -> None:
    """Not on an emulated machine, whose own GPU is predicted for."""
    missed = "outside the range predicted for the step time: zo2 1.40 s, predicted 800 ms to 1.30 s."
    assert missed in warnings_of([make_run(step_s=scaled(1.4))], ASKED)
    assert "outside the range" in warnings_of([make_run(step_s=scaled(0.7))], ASKED)
    assert "outside the range" not in warnings_of([make_run(step_s=scaled(1.3))], ASKED)
    assert "outside the range" not in warnings_of([emulated_run(step_s=scaled(1.4))], ASKED)
    unpredicted = make_run(step_s=scaled(1.4), plan=make_plan("zo2", step_s=None))
    assert "outside the range" not in warnings_of([unpredicted], ASKED)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),
        ({"gpu_name": "NVIDIA RTX 4090 MIG 1g"}, False),
        ({"gpu_name": "NVIDIA A100"}, True),
        ({"gpu_name": None}, True),
        ({"cpu": "another"}, True),
    ],
)
def test_a_profile_of_another_machine_is_said(changes: dict[str, str | None], warned: bool) -> None:
    runs = [make_run(environment=make_environment(**changes))]
    told = warnings_of(runs, ASKED, make_machine())
    assert ("not of the machine that ran" in told) == warned


def test_another_number_of_cores_than_was_measured_is_said() -> None:
    runs = [make_run(environment=make_environment(cores_usable=10))]
    told = warnings_of(runs, ASKED, make_machine())
    assert "measured with 16 usable cores, and runs had 10" in told
    emulated = [replace(run, environment=make_environment(cores_usable=10, emulated="x")) for run in runs]
    named = replace(make_machine(), name="x")
    assert "usable cores, and runs had" not in warnings_of(emulated, ASKED, named)


@pytest.mark.parametrize(
    ("taken_s", "said"), [(31e-6, "longer than"), (9e-6, "less than"), (17e-6, None), (None, None)]
)
def test_a_profile_of_another_processor_is_said(taken_s: float | None, said: str | None) -> None:
    """Of the same name, slower or quicker than it says; nothing where it was not measured."""
    runs = [make_run(forward_launch_s=taken_s), make_run("native", forward_launch_s=taken_s)]
    profile = make_machine()
    launch = replace(profile.cpu.adam_elements_per_s, value=20e-6, low=15e-6, high=30e-6)
    known = replace(profile, cpu=replace(profile.cpu, forward_launch_s=launch))
    told = warnings_of(runs, ASKED, known)
    assert ("Starting an operation took this processor" in told) == (said is not None)
    if said is not None:
        assert f"{format_seconds(taken_s)} after the runs, and 15.0 us by the machine's profile" in told
        assert said in told
    assert "Starting an operation" not in warnings_of(runs, ASKED, profile)
    emulated = [replace(each, environment=make_environment(emulated="a card")) for each in runs]
    assert "Starting an operation" not in warnings_of(emulated, ASKED, known)


def test_what_an_emulation_did_not_hold_is_said() -> None:
    held = emulated_run("zo2")
    assert held.emulation is not None
    unlike = replace(held.emulation, link="not emulated", rates_held=None)
    foreign = replace(emulated_run("torchao-offload"), emulation=unlike)
    few = replace(held, emulation=replace(held.emulation, threads_held=2))
    assert "emulated machine (rtx-4090)" in warnings_of([held], ASKED)
    assert "Not held" not in warnings_of([held], ASKED)
    assert "Not held to it: torchao-offload: link not emulated" in warnings_of([held, foreign], ASKED)
    assert "zo2: 2 CPU threads instead of 8" in warnings_of([few], ASKED)
