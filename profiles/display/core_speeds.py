"""Whether a machine's cores run at two speeds, in plain words. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable

from profiles.machine import Cpu, Figure
from profiles.units import format_nanoseconds, format_seconds, format_span

TWO_SPEEDS = 1.3
"""Slowest over quickest window, of the turn of a Python loop, from which cores are said to have two speeds.
On a shared host that was 1.5 to 1.9, within one speed 1.1 at most (`profiles.probe.core_speed`)."""


def has_two_speeds(cpu: Cpu) -> bool:
    """Whether windows of the probe differ that much; not of a profile without windows."""
    turn = cpu.python_turn_s
    return bool(turn.low and turn.high and turn.high >= TWO_SPEEDS * turn.low)


def _span(figure: Figure, form: Callable[[float | None], str]) -> str:
    """`32.0 to 62.0 ns (median 50.0 ns)`."""
    if figure.low is None or figure.high is None:
        return form(figure.value)
    return f"{format_span(figure.low, figure.high, form)} (median {form(figure.value)})"


def two_speeds_text(cpu: Cpu) -> str | None:
    """What that means, a sentence; `None`: they have one, or nobody has looked."""
    if not has_two_speeds(cpu):
        return None
    turn = _span(cpu.python_turn_s, format_nanoseconds)
    start = _span(cpu.forward_launch_s, format_seconds)
    return (
        f"Cores ran at two speeds: a turn of a Python loop took {turn}, starting an operation {start}. "
        "Other tenants of a host do that, or other programs, and it may change within a second: steps that "
        "wait for the processor vary as much, from run to run too."
    )
