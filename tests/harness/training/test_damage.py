"""Damage is found before anything is made of it, and no failure or kill costs what was finished."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import Killed, assert_same_weights, die_at, log_of, run, tiny_job, weights_of

from engines.errors import UserError
from engines.files.checksums import SUMS
from engines.files.writing import TEMPORARY
from harness.contacts import contacts_watched
from harness.progress import Progress
from harness.training import free_space
from harness.training import train as module
from harness.training.run_folder import read_run
from harness.training.train import export_run
from harness.training.update_log import HEADER_BYTES, RECORD_BYTES, damaged_copy, read_update_log


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def export(out: Path) -> Path:
    return export_run(out, out / "exported", Progress(quiet=True))


def killed(monkeypatch: pytest.MonkeyPatch, out: Path, engine: str, steps: int, **more: Any) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, engine, steps)
        with pytest.raises(Killed):
            run(out, engine, **more)


# --- a finished run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("save_every", [0, 2])
def test_a_finished_run_says_so_and_keeps_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_every: int
) -> None:
    out = tmp_path / "out"
    model = run(out, save_every=save_every)
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    monkeypatch.setattr(module, "export_model", None)  # nothing may be written
    monkeypatch.setattr(module, "make_data", None)
    assert run(out, save_every=save_every, resume=True) == model
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_a_finished_model_that_is_damaged_is_no_finished_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = run(out, save_every=2)
    weights = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    flip(model / "model.safetensors", 5000)
    with pytest.raises(UserError, match=r"is damaged.*delete model/ there"):
        run(out, resume=True)
    shutil.rmtree(model)
    again = weights_of(run(out, resume=True))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_a_model_whose_export_was_killed_is_exported_on_resume(tmp_path: Path) -> None:
    """What the kill left is cleared."""
    whole = run(tmp_path / "whole", "mezo")
    out = tmp_path / "out"
    run(out, "mezo")
    (out / "model").rename(out / f"{TEMPORARY}0123")
    (out / ".model.ab12cd34").mkdir()  # as earlier versions called it
    assert_same_weights(whole, run(out, "mezo", resume=True))
    assert {path.name for path in out.iterdir()} == {
        "engine.json",
        "job.toml",
        "log.jsonl",
        "model",
        "summary.json",
        "updates.log",
    }


# --- bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["native", "lsp", "zo2"])
def test_a_bit_flipped_in_a_checkpoint_is_found_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """In every file of it, at its ends and in twenty places between."""
    out = tmp_path / "out"
    killed(monkeypatch, out, engine, 5, save_every=4)
    (checkpoint,) = (out / "checkpoints").iterdir()
    for path in sorted(checkpoint.iterdir()):
        size, sound = path.stat().st_size, path.read_bytes()
        for position in {0, size - 1, *range(0, size, max(1, size // 20))}:
            flip(path, position)
            with pytest.raises(
                UserError, match=r"is damaged|is missing|is not a list of checksums|is not UTF-8"
            ):
                module.restore.load_newest(None, out)  # type: ignore[arg-type]  # what is loaded has no say
            path.write_bytes(sound)
    before = log_of(out)
    flip(next(checkpoint.glob("*.safetensors")), 3000)
    for call in (lambda: run(out, engine, resume=True), lambda: export(out)):
        with pytest.raises(UserError, match="is damaged"):
            call()
    assert log_of(out) == before


@pytest.mark.parametrize("engine", ["native", "mezo"])
def test_a_bit_flipped_in_an_export_is_found_before_it_is_trained_on(tmp_path: Path, engine: str) -> None:
    base = run(tmp_path / "base", "native", tiny_job(steps=1))
    for path in sorted(base.iterdir()):
        if path.name in ("generation_config.json", SUMS):  # of the sums only lines of what is read matter
            continue
        sound = path.read_bytes()
        for position in (0, len(sound) // 2, len(sound) - 1):
            flip(path, position)
            with pytest.raises(UserError) as caught:
                run(tmp_path / "out", engine, tiny_job(steps=1, model={"name": str(base)}))
            assert "\n" not in str(caught.value)
            path.write_bytes(sound)
    run(tmp_path / "out", engine, tiny_job(steps=1, model={"name": str(base)}))


@pytest.mark.parametrize("step", range(6))
def test_a_bit_flipped_in_the_update_log_is_damage_and_no_torn_end(tmp_path: Path, step: int) -> None:
    """The last record's too: a kill does not leave a whole record that is not sound."""
    whole = run(tmp_path / "whole", "mezo")
    out = tmp_path / "out"
    run(out, "mezo")
    shutil.rmtree(out / "model")
    path = out / "updates.log"
    flip(path, HEADER_BYTES + step * RECORD_BYTES + step)
    damaged = path.read_bytes()
    for call in (lambda: export(out), lambda: read_run(out)):
        with pytest.raises(UserError, match=f"is damaged behind step {step}; .*run --resume"):
            call()
    assert path.read_bytes() == damaged
    assert_same_weights(whole, run(out, "mezo", resume=True))
    assert damaged_copy(path).read_bytes() == damaged
    assert path.read_bytes() == (tmp_path / "whole" / "updates.log").read_bytes()


def test_zeros_that_a_power_cut_left_are_a_torn_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, "mezo")
    path = out / "updates.log"
    path.write_bytes(path.read_bytes()[:-RECORD_BYTES] + bytes(3 * RECORD_BYTES))
    contents = read_update_log(path)
    assert (contents.end_step, contents.torn_bytes, contents.damaged) == (5, 3 * RECORD_BYTES, False)


def test_a_line_of_the_log_that_is_damaged_costs_that_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed(monkeypatch, out, "mezo", 4)
    lines = (out / "log.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for bad in (
        '{"step": 2, "lo',
        "[" * 10**5,
        '{"loss": 1}',
        '{"step": "2", "loss": 1}',
        '{"step": 2, "loss": []}',
    ):
        (out / "log.jsonl").write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        assert len(module.restore.history_of(out)) == 3


# --- writes that fail ---------------------------------------------------------------------------------


def limited(bytes_: int) -> Callable[[], None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_that_cannot_save_says_so_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_step(self: Any, batches: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(module.load_engine("native"), "step", no_step)
    lift = limited(100_000)
    try:
        with pytest.raises(UserError, match=r"files may have .* here.*ulimit -f"):
            run(tmp_path / "out")
    finally:
        lift()
    full = os.statvfs(tmp_path)
    for field, value in (("f_bavail", 100), ("f_favail", 3)):
        values = {name: getattr(full, name) for name in ("f_bavail", "f_frsize", "f_files", "f_favail")} | {
            field: value
        }
        monkeypatch.setattr(free_space.os, "statvfs", lambda path, values=values: type("Full", (), values))
        with pytest.raises(UserError, match=r"free, the run writes|more files"):
            run(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_whose_blocks_on_disk_leave_no_room_for_its_export_does_not_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of one disk: what was free for the export is taken by the set-up."""
    cls, values = module.load_engine("zo2"), {"f_bavail": 2, "f_frsize": 2**20, "f_files": 0}
    setup = cls.setup

    def and_then_full(self: Any, blueprint: Any) -> None:
        setup(self, blueprint)
        monkeypatch.setattr(free_space.os, "statvfs", lambda path: type("Full", (), values))

    def no_step(self: Any, batches: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(cls, "setup", and_then_full)
    monkeypatch.setattr(cls, "step", no_step)
    job = tiny_job(model={"name": "tiny-llama", "random_weights": True}, eval_every=1)
    with pytest.raises(UserError, match="free, the run writes"):
        run(tmp_path / "out", "zo2", job, disk_blocks=1, disk_folder=str(tmp_path / "spill"))


def test_a_finished_run_says_where_things_lie_and_whom_it_asked(tmp_path: Path) -> None:
    with contacts_watched():
        run(tmp_path / "out", "zo2", disk_blocks=1, disk_folder=str(tmp_path / "spill"))
    facts = json.loads((tmp_path / "out" / "summary.json").read_text())["governance"]
    assert (facts["hub"], facts["sent"], facts["contacted"]) == ("not needed", "nothing", [])
    places = {each["what"]: (each["where"], each["name"]) for each in facts["places"]}
    assert places == {
        "weights": ("seed", ""), "data": ("program", ""), "spill": ("user", "spill"),
        "records": ("results", "summary.json"), "logs": ("results", "log.jsonl"),
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["native", "lsp", "mezo"])
def test_an_export_that_fails_leaves_the_trained_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    whole = run(tmp_path / "whole", engine)
    out = tmp_path / "out"
    original = module.export_model

    def cramped(*arguments: Any) -> None:
        lift = limited(20_000)
        try:
            original(*arguments)
        finally:
            lift()

    with monkeypatch.context() as patch:
        patch.setattr(module, "export_model", cramped)
        with pytest.raises(UserError, match="the model cannot be written"):
            run(out, engine)
    assert not [path for path in out.iterdir() if path.name.startswith(TEMPORARY)]
    with monkeypatch.context() as patch:
        die_at(patch, engine, 0)  # no step is taken again
        assert_same_weights(whole, run(out, engine, resume=True))


def test_a_log_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the file is closed, with the line that found no room."""
    cls, lifts = module.load_engine("native"), []
    step = cls.step

    def cramped(self: Any, batches: Any) -> Any:
        lifts.append(limited(10))
        return step(self, batches)

    monkeypatch.setattr(cls, "step", cramped)
    try:
        with pytest.raises(UserError, match=r"log.jsonl: cannot be written \(File too large\)"):
            run(tmp_path / "out")
    finally:
        lifts[0]()


def test_an_export_that_a_defect_ends_leaves_the_trained_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def defect(*_: Any) -> None:
        raise ValueError("of a library")

    with monkeypatch.context() as patch:
        patch.setattr(module, "export_model", defect)
        with pytest.raises(ValueError, match="of a library"):
            run(tmp_path / "out")
    die_at(monkeypatch, "native", 0)  # no step is taken again
    run(tmp_path / "out", resume=True)


# --- leftovers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "left", [("engine.json",), (f"{TEMPORARY}ab", "engine.json"), (".job.toml.x1y2z3w4", "engine.json")]
)
def test_what_a_kill_in_the_first_writes_leaves_is_begun_anew(
    tmp_path: Path, resume: bool, left: tuple[str, ...]
) -> None:
    whole = run(tmp_path / "whole", "mezo")
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text("{")
    assert_same_weights(whole, run(out, "mezo", resume=resume))
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_the_umask_holds_for_all_that_a_run_leaves(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run(tmp_path / "out", "mezo", save_every=2)
    finally:
        os.umask(before)
    found = list((tmp_path / "out").rglob("*"))
    assert {path.stat().st_mode & 0o077 for path in found} == {0}
    os.umask(0o027)
    try:
        model = run(tmp_path / "shared", "native", tiny_job(steps=1))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in model.iterdir()} == {0o640}
    assert (model / SUMS).exists()
