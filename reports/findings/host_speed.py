"""Methods whose steps wait for the processor, and had it at unlike speeds. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from engines.shapes import ModelShape
from harness.host_speed import MethodAtSpeeds, unlike_speeds
from harness.records.run import Run
from profiles.machine import Machine
from profiles.units import format_nanoseconds, format_seconds
from reports.messages import say, several_items


def about_speeds(runs: Sequence[Run], machine: Machine | None, shape: ModelShape | None) -> tuple[str, ...]:
    """A sentence, and whether the order of the methods may be the processor's; none where the GPU or the link
    decides all steps."""
    found = unlike_speeds(runs, machine, shape)
    if found is None:
        return ()
    text = say(
        "warning.unlike_speeds",
        quick=format_seconds(found.quick_s),
        slow=format_seconds(found.slow_s),
        items=several_items(_told(one) for one in found.waiting),
    )
    order = (
        say("warning.same_order")
        if found.turned is None
        else say("warning.turned", slower=found.turned[0], faster=found.turned[1])
    )
    return (f"{text} {order}",)


def _told(one: MethodAtSpeeds) -> str:
    started = format_seconds(one.started_s)
    if one.python_turn_s is not None:
        started = say("warning.with_loop", started=started, turn=format_nanoseconds(one.python_turn_s))
    return say(
        "warning.at_speed",
        engine=one.engine,
        started=started,
        step=format_seconds(one.step_s),
        quick=format_seconds(one.step_quick_s),
        slow=format_seconds(one.step_slow_s),
    )
