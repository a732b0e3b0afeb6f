from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from forked import children

from engines import load_engine
from engines.base import Context
from engines.errors import InfeasiblePlan, NotAvailable, UserError
from engines.methods.scripted import OutOfMemoryError, Scripted
from engines.settings.parse import parse_settings
from engines.settings.scripted import ScriptedSettings
from engines.shapes import Workload


def make_engine(**settings: object) -> Scripted:
    context = Context(device="cpu", workload=Workload(batch_size=1, seq_len=8), seed=0, total_steps=4)
    engine: Scripted = load_engine("scripted")(ScriptedSettings(**settings), context)  # type: ignore[arg-type]
    return engine


def test_plays_its_script_and_repeats_the_last_value() -> None:
    engine = make_engine(
        setup_s=2.0, step_s=(0.25, 0.5), loss=(3.0, 2.0, 1.0), gpu_s=(0.125,), h2d_bytes=7, d2h_bytes=5
    )
    engine.setup(None)
    assert engine.now() == 2.0
    steps = [engine.step([]) for _ in range(4)]
    assert [stats.loss for stats in steps] == [3.0, 2.0, 1.0, 1.0]
    assert {(stats.h2d_bytes, stats.d2h_bytes, stats.gpu_s) for stats in steps} == {(7, 5, 0.125)}
    assert engine.now() == 2.0 + 0.25 + 3 * 0.5


def test_work_in_flight_is_spent_once_by_synchronize() -> None:
    engine = make_engine(step_s=(1.0,), drain_s=0.5)
    engine.setup(None)
    engine.step([])
    engine.step([])
    assert engine.now() == 2.0
    engine.synchronize()
    engine.synchronize()
    assert engine.now() == 2.5


def test_evaluations_follow_their_script() -> None:
    engine = make_engine(eval_loss=(2.0, 1.0), eval_accuracy=(0.25, 0.75))
    first, second = engine.evaluate([]), engine.evaluate([])
    assert (first.loss, first.accuracy, second.loss, second.accuracy) == (2.0, 0.25, 1.0, 0.75)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        ("crash", RuntimeError),
        ("oom_gpu", OutOfMemoryError),
        ("oom_host", MemoryError),
        ("pinned_limit", RuntimeError),
        ("not_available", NotAvailable),
        ("infeasible", InfeasiblePlan),
        ("user_error", UserError),
    ],
)
def test_fails_in_the_step_it_is_told(failure: str, error: type[Exception]) -> None:
    engine = make_engine(fail_at_step=1, failure=failure)
    engine.setup(None)
    engine.step([])
    with pytest.raises(error):
        engine.step([])
    with pytest.raises(error):
        make_engine(fail_at_step=-1, failure=failure).setup(None)


def test_saves_and_goes_on(tmp_path: Path) -> None:
    engine = make_engine(loss=(4.0, 3.0, 2.0))
    engine.step([])
    engine.evaluate([])
    engine.save(tmp_path)
    other = make_engine(loss=(4.0, 3.0, 2.0))
    other.load(tmp_path)
    assert other.step([]).loss == 3.0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # pytest's process may have threads
def test_children_wait_and_end_with_the_engine() -> None:
    engine = make_engine(num_children=2)
    engine.setup(None)
    started = children(recursive=False)
    assert len(started) == 2
    engine.close()
    engine.close()
    assert not any(child.is_running() for child in started)


MEASURES_ITSELF = """
import psutil
from engines.base import Context, Workload
from engines.methods.scripted import Scripted
from engines.settings.parse import parse_settings

settings = parse_settings("scripted", {"host_allocation_bytes": 64 * 2**20, "pinned_bytes": 9})
workload = Workload(batch_size=1, seq_len=4, dtype="fp32")
engine = Scripted(settings, Context(device="cpu", workload=workload, seed=0, total_steps=1))
before = psutil.Process().memory_info().rss
engine.setup(None)
print(psutil.Process().memory_info().rss - before, engine.pinned_bytes)
"""


def test_memory_is_touched() -> None:
    """In a process of its own: in one that has run much, malloc may hand out what is resident already."""
    done = subprocess.run([sys.executable, "-c", MEASURES_ITSELF], capture_output=True, text=True, check=True)
    grown_bytes, pinned_bytes = map(int, done.stdout.split())
    assert grown_bytes > 60 * 2**20
    assert pinned_bytes == 9


def test_settings_come_as_text_as_numbers_and_as_lists() -> None:
    settings = parse_settings("scripted", {"step_s": "0.5,1", "loss": "2,nan", "eval_loss": 3})
    assert settings.step_s == (0.5, 1.0)
    assert settings.loss[0] == 2.0
    assert math.isnan(settings.loss[1])
    assert settings.eval_loss == (3.0,)
    assert parse_settings("scripted", {"step_s": [1, 2]}).step_s == (1.0, 2.0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"step_s": []}, "step_s"),
        ({"step_s": "fast"}, "step_s"),
        ({"setup_s": -1}, "setup_s"),
        ({"failure": "fire"}, "failure"),
        ({"speed": 1}, "speed"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_settings("scripted", values)


def test_imports_no_torch() -> None:
    code = "import sys, engines.methods.scripted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
