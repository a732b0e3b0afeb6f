"""Spans of streams as events that chrome://tracing and Perfetto read."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch

from engines.transfer import trace
from engines.transfer.trace import STREAMS, Timeline

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The engines' clock, in seconds, set by hand."""
    now = [100.0]
    monkeypatch.setattr(trace, "now_s", lambda: now[0])
    return now


def spans(events: list[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """(stream, name, ts, dur) of each span, streams by the name that the metadata gives their tid."""
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return [
        (named[event["tid"]], event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X"
    ]


def test_spans_have_microseconds_since_the_start_and_a_line_per_stream(clock: list[float]) -> None:
    line = Timeline(CPU)
    clock[0] = 100.5
    upload = line.begin("upload", "block 1")
    clock[0] = 100.75
    compute = line.begin("compute", "block 0")
    clock[0] = 101.0
    line.end(upload)
    clock[0] = 101.5
    line.end(compute)
    events = line.events()
    assert spans(events) == [("upload", "block 1", 5e5, 5e5), ("compute", "block 0", 7.5e5, 7.5e5)]
    assert json.loads(json.dumps(events)) == events
    assert {event["pid"] for event in events} == {0}
    assert line.events() == events


def test_streams_keep_their_order_whichever_is_used_first(clock: list[float]) -> None:
    line = Timeline(CPU)
    for stream in ("cpu", "perturb", "upload", "perturb"):
        line.end(line.begin(stream, "work"))
    tids = {event["args"]["name"]: event["tid"] for event in line.events() if event["name"] == "thread_name"}
    assert tids == {"upload": 0, "perturb": STREAMS.index("perturb"), "cpu": len(STREAMS)}


def test_work_that_never_ended_is_left_out(clock: list[float]) -> None:
    line = Timeline(CPU)
    line.begin("compute", "failed")
    assert spans(line.events()) == []


def test_places_do_not_depend_on_how_long_a_run_is(clock: list[float]) -> None:
    """References are renewed on the way; the spans lie where they lay on the clock."""
    line = Timeline(CPU)
    for second in range(0, 60, 4):
        clock[0] = 100.0 + second
        span = line.begin("compute", str(second))
        clock[0] += 1.0
        line.end(span)
    assert spans(line.events()) == [("compute", str(second), second * 1e6, 1e6) for second in range(0, 60, 4)]


def test_threads_may_share_a_timeline() -> None:
    line = Timeline(CPU)

    def work(stream: str) -> None:
        for index in range(50):
            line.end(line.begin(stream, str(index)))

    threads = [threading.Thread(target=work, args=(stream,)) for stream in ("upload", "download")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = spans(line.events())
    for stream in ("upload", "download"):
        assert [name for where, name, _, _ in found if where == stream] == [str(i) for i in range(50)]


@pytest.mark.gpu
def test_on_a_gpu_spans_lie_in_the_order_of_their_streams() -> None:
    device = torch.device("cuda:0")
    side = torch.cuda.Stream(device)
    line = Timeline(device)
    first = line.begin("compute", "first")
    torch.cuda._sleep(10_000_000)
    line.end(first)
    done = torch.cuda.Event()
    done.record()
    side.wait_event(done)
    upload = line.begin("upload", "after it", on=side)
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000)
    line.end(upload, on=side)
    with torch.cuda.stream(side):
        line.end(line.begin("upload", "on the current stream"))
    found = {name: (stream, ts, dur) for stream, name, ts, dur in spans(line.events())}
    assert found["first"][0] == "compute"
    assert all(ts >= 0 and dur >= 0 for _, ts, dur in found.values())
    assert found["after it"][1] >= found["first"][1] + found["first"][2] - 10
    assert found["on the current stream"][1] >= found["after it"][1] + found["after it"][2] - 10


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    line = Timeline(torch.device("cuda:0"))
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append("device"))
    torch.cuda._sleep(1_000_000_000)  # longer than any set-up of an event
    span = line.begin("compute", "behind a long kernel")
    line.end(span)
    assert waited == []
    assert not span.stop.query()
