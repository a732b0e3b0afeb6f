"""How wide a predicted range must be: with what the other families' steps need, is this family's inside?

    python tests/studies/prediction_ranges.py [FOLDER ...]

For every step that was measured alone, in the folders of `prediction_grid.py` (all four by default) and in
reports/results: by how much the model's factor would have to widen the range of the machine's figures until
the step is in it. Steps are in classes, by the factor that `profiles.planning.predict` gives them. Of each
class one family after the other is left out; the factor that nine in ten of the others need is held against
it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from engines.shapes import ModelShape  # noqa: E402
from harness.pipeline import plan_job  # noqa: E402
from harness.records.job import load_job, make_job  # noqa: E402
from harness.records.run import load_run  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402
from profiles.machine import load_machine  # noqa: E402
from profiles.planning.plan import Prediction  # noqa: E402
from profiles.planning.predict import predict  # noqa: E402
from tests.profiles.planning.test_published_predictions import FOLDERS, as_it_ran, runs  # noqa: E402
from tests.studies.prediction_grid import BESIDE_OTHERS, cost_of, with_link  # noqa: E402

GRIDS = tuple(
    Path(__file__).parent / f"prediction_grid_h200{when}" for when in ("", "_evening", "_night", "_midnight")
)
LEAST = 3
"""Steps of other families from which a factor is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    family: str
    factor: float
    """The model's own error, as the plan states it."""
    needed: float
    """With which the step is just inside; 1 where the machine's figures do."""

    @property
    def is_inside(self) -> bool:
        return self.needed <= self.factor


def step_of(shape: ModelShape, told: Prediction, taken_s: float | None) -> Step | None:
    if taken_s is None or told.step_s_low is None or told.step_s_high is None:
        return None
    factor = float(told.basis.rpartition("a factor of ")[2].partition(" ")[0])
    needed = max(1.0, told.step_s_low * factor / taken_s, taken_s / (told.step_s_high / factor))
    return Step(family=shape.family, factor=factor, needed=needed)


def published() -> Iterator[Step | None]:
    for folder in FOLDERS:
        job, machine = load_job(folder / "job.toml"), load_machine(folder / "machine.json")
        job = as_it_ran(job, folder.name.rpartition("_")[2], runs(folder))
        shape = resolve_shape(job)
        taken_s = {run.engine: run.summary.step_s_median for run in runs(folder)}
        for plan in plan_job(job, shape, machine, list(taken_s)):
            yield step_of(shape, plan.prediction, taken_s[plan.engine])


def of_grid(folder: Path) -> Iterator[Step | None]:
    measured = load_machine(folder / "machine.json")
    for path in sorted((folder / "runs").glob("*.json")):
        record = load_run(path)
        if record.end_state != "ok" or BESIDE_OTHERS in record.environment.notes:
            continue
        job, machine = make_job(record.job, record.id), measured
        if record.emulation is not None:
            machine = with_link(machine, record.emulation.rates.h2d_bytes_per_s)
        told = predict(cost_of(record, job), machine, job.workload)
        yield step_of(resolve_shape(job), told, record.summary.step_s_median)


def nine_in_ten(values: Sequence[float]) -> float:
    """The least that nine in ten do not go beyond."""
    return sorted(values)[-(-9 * len(values) // 10) - 1]


def left_out(steps: Sequence[Step]) -> list[tuple[str, int, int, float]]:
    """Of each family: its steps, those inside the others' factor, and that factor. Steps of one class."""
    found = []
    for family in sorted({each.family for each in steps}):
        others = [each.needed for each in steps if each.family != family]
        if len(others) < LEAST:
            continue
        own = [each.needed for each in steps if each.family == family]
        factor = nine_in_ten(others)
        found.append((family, len(own), sum(each <= factor for each in own), factor))
    return found


def main(folders: Sequence[str]) -> int:
    grids = [Path(each) for each in folders] or list(GRIDS)
    told = [*published(), *(step for folder in grids for step in of_grid(folder))]
    steps = [step for step in told if step is not None]
    asked = held = 0
    print("| factor | steps | inside | nine in ten need | family left out: inside, of, others' factor |")
    print("| ---: | ---: | ---: | ---: | --- |")
    for factor in sorted({each.factor for each in steps}):
        of_class = [each for each in steps if each.factor == factor]
        rows = left_out(of_class)
        asked += sum(count for _, count, _, _ in rows)
        held += sum(inside for _, _, inside, _ in rows)
        apart = "; ".join(f"{name} {inside}, {count}, {other:.2f}" for name, count, inside, other in rows)
        print(
            f"| {factor:g} | {len(of_class)} | {sum(each.is_inside for each in of_class)} "
            f"| {nine_in_ten([each.needed for each in of_class]):.2f} | {apart or '-'} |"
        )
    print(f"\nInside today's ranges: {sum(each.is_inside for each in steps)} of {len(steps)}")
    print(f"Of families left out, inside with the factor of the others: {held} of {asked}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
