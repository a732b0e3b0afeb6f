"""The update log: exact, cut at whatever is torn or damaged, never mistaken for another run's."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import Update
from engines.errors import UserError
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from harness.records.job import Job, make_job
from harness.training.update_log import (
    HEADER_BYTES,
    RECORD_BYTES,
    Contents,
    LogOrigin,
    UpdateLog,
    check_belongs,
    decode,
    encode_header,
    read_update_log,
    run_digest,
)

ORIGIN = LogOrigin(seed=7, start_step=0, run_sha256=b"r" * 32, weights_sha256=b"w" * 32)
NUMBERS = st.floats(allow_nan=False, width=64)


@st.composite
def runs(draw: st.DrawFn) -> tuple[LogOrigin, list[Update]]:
    start = draw(st.integers(0, 2**31))
    values = draw(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=12))
    updates = [
        Update(step=start + number, learning_rate=rate, projected_gradient=gradient, weight_decay=decay)
        for number, (rate, gradient, decay) in enumerate(values)
    ]
    return replace(ORIGIN, start_step=start, seed=draw(st.integers(0, 2**64 - 1))), updates


def written(path: Path, origin: LogOrigin, updates: Sequence[Update]) -> bytes:
    log = UpdateLog.create(path, origin)
    for update in updates:
        log.append(update)
    log.close()
    return path.read_bytes()


def bits(updates: Sequence[Update]) -> list[tuple[int, bytes]]:
    """-0.0 is not 0.0 here."""
    return [
        (u.step, struct.pack("<ddd", u.learning_rate, u.projected_gradient, u.weight_decay)) for u in updates
    ]


def updates_of(contents: Contents) -> list[Update]:
    return list(contents.updates(contents.origin.start_step))


def some(count: int, start: int = 0) -> list[Update]:
    return [
        Update(step=start + i, learning_rate=1e-6 / 3, projected_gradient=-0.1 * i, weight_decay=0.0)
        for i in range(count)
    ]


@given(runs())
def test_what_is_read_is_what_was_written_bit_for_bit(run: tuple[LogOrigin, list[Update]]) -> None:
    origin, updates = run
    with tempfile.TemporaryDirectory() as folder:
        content = written(Path(folder) / "updates.log", origin, updates)
    assert len(content) == HEADER_BYTES + RECORD_BYTES * len(updates)
    contents = decode(content, "log")
    assert contents.origin == origin
    assert contents.torn_bytes == 0
    assert contents.end_step == origin.start_step + len(updates)
    assert bits(updates_of(contents)) == bits(updates)
    middle = origin.start_step + len(updates) // 2
    assert bits(list(contents.updates(middle))) == bits(updates[len(updates) // 2 :])


def test_a_query_takes_32_bytes_at_most() -> None:
    assert RECORD_BYTES <= 32


@pytest.mark.parametrize("cut", [1, RECORD_BYTES, 2 * RECORD_BYTES + 5])
def test_of_a_step_that_is_not_there_whole_no_query_is_read(cut: int, tmp_path: Path) -> None:
    """Three queries a step: their records are written at once, and cut off together."""
    path = tmp_path / "updates.log"
    origin = replace(ORIGIN, start_step=5, queries=3)
    steps = [[replace(each, step=step, query=i, queries=3) for i, each in enumerate(some(3))]
             for step in (5, 6, 7)]  # fmt: skip
    log = UpdateLog.create(path, origin)
    for updates in steps:
        log.append(*updates)
    log.close()
    content = path.read_bytes()
    assert len(content) == HEADER_BYTES + 9 * RECORD_BYTES
    contents = decode(content, "log")
    assert (contents.origin, contents.end_step, contents.torn_bytes) == (origin, 8, 0)
    assert updates_of(contents) == [update for updates in steps for update in updates]
    path.write_bytes(content[:-cut])
    log, contents = UpdateLog.reopen(path)
    assert contents.end_step == 7
    assert contents.torn_bytes == 3 * RECORD_BYTES - cut
    assert list(contents.updates(6)) == steps[1]
    with pytest.raises(ValueError, match="cannot follow step 6"):
        log.append(*steps[2][:2])
    log.append(*steps[2])
    log.close()
    assert path.read_bytes() == content


@given(runs(), st.data())
def test_a_torn_or_damaged_tail_is_cut_off_and_the_log_goes_on(
    run: tuple[LogOrigin, list[Update]], data: st.DataObject
) -> None:
    """Cut anywhere behind the header, with anything behind the cut or one byte changed there: the records
    before it are all there, and the log that goes on from them is one that was never torn."""
    origin, updates = run
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "updates.log"
        content = written(path, origin, updates)
        place = data.draw(st.integers(HEADER_BYTES, len(content)), label="place")
        kind = data.draw(st.sampled_from(["torn", "garbage", "flipped"]), label="kind")
        if kind == "torn":
            damaged = content[:place]
        elif kind == "garbage":
            damaged = content[:place] + data.draw(st.binary(min_size=1, max_size=80), label="garbage")
            sound = 0
            while damaged[: HEADER_BYTES + sound + 1] == content[: HEADER_BYTES + sound + 1]:
                if HEADER_BYTES + sound >= len(content):
                    break
                sound += 1
            place = HEADER_BYTES + sound  # garbage may begin as what it took the place of
        else:
            place = min(place, len(content) - 1)
            if place < HEADER_BYTES:
                return
            flip = data.draw(st.integers(1, 255), label="flip")
            damaged = content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :]
        whole = (place - HEADER_BYTES) // RECORD_BYTES
        path.write_bytes(damaged)
        assert bits(updates_of(read_update_log(path))) == bits(updates[:whole])
        assert path.read_bytes() == damaged  # reading changes nothing

        log, contents = UpdateLog.reopen(path)
        assert bits(updates_of(contents)) == bits(updates[:whole])
        assert contents.torn_bytes == len(damaged) - HEADER_BYTES - whole * RECORD_BYTES
        for update in updates[whole:]:
            log.append(update)
        log.close()
        assert path.read_bytes() == content


def test_records_of_another_log_do_not_pass(tmp_path: Path) -> None:
    ours = written(tmp_path / "a", ORIGIN, some(2))
    theirs = written(tmp_path / "b", replace(ORIGIN, seed=8), some(3))
    mixed = ours + theirs[HEADER_BYTES + 2 * RECORD_BYTES :]
    assert decode(mixed, "log").end_step == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not an update log"),
        (b"PK\3\4" * 40, "is not an update log"),
        (encode_header(ORIGIN)[:-1], "header is damaged"),
        (encode_header(ORIGIN)[:40] + b"x" + encode_header(ORIGIN)[41:], "header is damaged"),
        (encode_header(ORIGIN)[:8] + b"\3" + encode_header(ORIGIN)[9:], "has version 3"),
    ],
)
def test_what_is_no_log_is_one_line_and_stays_as_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "updates.log"
    path.write_bytes(content)
    for call in (read_update_log, UpdateLog.reopen):
        with pytest.raises(UserError, match=words) as caught:
            call(path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    path = tmp_path / "updates.log"
    log = UpdateLog.create(path, ORIGIN)
    log.append(some(1)[0])
    with pytest.raises(UserError, match="another process is training into this folder"):
        UpdateLog.reopen(path)
    assert read_update_log(path).end_step == 1
    log.close()
    again, _ = UpdateLog.reopen(path)
    again.close()


def test_steps_are_consecutive(tmp_path: Path) -> None:
    log = UpdateLog.create(tmp_path / "updates.log", replace(ORIGIN, start_step=5))
    with pytest.raises(ValueError, match="cannot follow step 4"):
        log.append(some(1)[0])
    log.append(some(1, start=5)[0])
    with pytest.raises(ValueError, match="cannot follow step 5"):
        log.append(some(1, start=5)[0])
    log.close()


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        UpdateLog.create(tmp_path / "file" / "updates.log", ORIGIN)
    with pytest.raises(UserError, match="there is no such update log"):
        read_update_log(tmp_path / "updates.log")


# --- whose log it is ----------------------------------------------------------------------------------


def a_job(**fields: Any) -> Job:
    return make_job({"model": {"name": "tiny-llama", "random_weights": True}, **fields}, "test job")


@pytest.mark.parametrize(
    "fields",
    [
        {"seq_len": 16}, {"seed": 1}, {"steps": 11}, {"dtype": "fp16"}, {"accumulation": 2},
        {"data": {"train": "random"}}, {"model": {"name": "tiny-opt", "random_weights": True}},
    ],
)  # fmt: skip
def test_the_digest_tells_jobs_apart(fields: dict[str, Any]) -> None:
    assert run_digest(a_job(), MezoSettings()) != run_digest(a_job(**fields), MezoSettings())


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 2e-6}, {"eps": 2e-3}, {"rounding": "nearest"}, {"noise": "binomial"},
        {"estimator": "1.5-spsa"},
    ],
)  # fmt: skip
def test_the_digest_tells_settings_apart(settings: dict[str, Any]) -> None:
    assert run_digest(a_job(), MezoSettings()) != run_digest(a_job(), MezoSettings(**settings))


def test_the_digest_tells_curvatures_apart_where_they_count() -> None:
    for values in ({"curvature_alpha": 0.5}, {"curvature_floor": 2.0}):
        for estimator in ("spsa", "1.5-spsa"):
            ours, other = (
                run_digest(a_job(), MezoSettings(estimator=estimator, **each)) for each in ({}, values)
            )
            assert (ours == other) == (estimator == "spsa")


def test_the_digest_does_not_tell_where_things_lie() -> None:
    """`mezo` and `zo2` take the same steps; limits and evaluations change no update."""
    ours = run_digest(a_job(), MezoSettings())
    assert ours == run_digest(a_job(), Zo2Settings(resident_blocks=2, fold_every=4))
    assert ours == run_digest(a_job(eval_batches=3, limits={"timeout_s": 5.0}), MezoSettings())


@pytest.mark.parametrize(
    ("settings", "begun_with"),
    [
        (MezoSettings(), "83e12d4bd0a0190c6365ef47a034b2a000dc354a20b1382b2940134d81ec3ab3"),
        (
            Zo2Settings(fold_every=4, resident_blocks=1),
            "83e12d4bd0a0190c6365ef47a034b2a000dc354a20b1382b2940134d81ec3ab3",
        ),
        (MezoSettings(base="int8"), "367ddd62b25b6e7de075f99c4aabb84741cf8c1ef5d488f45044a3d296d28265"),
        (
            MezoSettings(base="int8", fold_every=4),
            "8d9afebdc62a2c344dd3efca96e627ade02426fa612e91e5d4d00e1269544dc5",
        ),
        (
            MezoSettings(base="int8", fold_every=4, train="lora"),
            "57acac1c7eee5f07110cc6a29c635cc081c8981578db40a3f617524896745a60",
        ),
        (
            MezoSettings(base="int4", estimator="lozo"),
            "4bfaec6d476988a468e7d87c6ec6725bcb07d7354ffa4116f7c4be363cc1c0a7",
        ),
        (
            MezoSettings(estimator="fzoo", queries=4, noise="rademacher"),
            "6f74ad159ee930f2066390f4fea06e752cb9b0eac27bd9de3b20826ca36b57da",
        ),
        (
            MezoSettings(train="last:2", base="fp8", fold_every=2),
            "23b00a7ecf4c0f4f3e00d24c42e90ddd10d50d8269c61b42b7237366fe7159d6",
        ),
    ],
    ids=str,
)
def test_logs_of_earlier_versions_are_still_those_of_their_runs(
    settings: MezoSettings, begun_with: str, tmp_path: Path
) -> None:
    """Digests as the version wrote them that had `layer_share`, and asked the base alone for `fold_every`."""
    job, path = a_job(), tmp_path / "updates.log"
    written(path, replace(ORIGIN, seed=job.seed, run_sha256=bytes.fromhex(begun_with)), some(2))
    check_belongs(read_update_log(path), job, settings, path)
    if settings.train != "lora":
        assert run_digest(job, settings).hex() == begun_with


def test_where_fold_every_decides_nothing_it_tells_no_runs_apart() -> None:
    def digest(**values: Any) -> bytes:
        return run_digest(a_job(), Zo2Settings(base="int8", **values))

    assert digest(train="lora", fold_every=4) == digest(train="lora")
    assert digest(fold_every=4) != digest()


def test_a_log_of_another_run_is_one_line(tmp_path: Path) -> None:
    job = a_job()
    origin = replace(ORIGIN, seed=job.seed, run_sha256=run_digest(job, MezoSettings()))
    path = tmp_path / "updates.log"
    written(path, origin, some(2))
    check_belongs(read_update_log(path), job, Zo2Settings(), path)
    with pytest.raises(UserError, match="belongs to another job or to other settings") as caught:
        check_belongs(read_update_log(path), a_job(seed=3), MezoSettings(), path)
    assert "\n" not in str(caught.value)
