"""Security and data governance as a checklist: what was seen is filled in, the rest is to tick. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.records.governance import Place
from harness.records.run import Run
from profiles.language import enumerated
from profiles.units import format_bytes
from reports.messages import say, several_items

TO_TICK = ("disk", "readers", "weights_use", "data_use", "delete")
"""What no program sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GovernanceLine:
    """A line of the checklist."""

    about: str
    text: str
    seen: bool
    """The program saw it; else it is for a person to tick."""


def governance_lines(runs: Sequence[Run]) -> tuple[GovernanceLine, ...]:
    """Empty where no record has such facts, as those of before. Where runs differ, each fact is told."""
    facts = [run.governance for run in runs if run.governance is not None]
    if not facts:
        return ()
    seen: dict[str, list[str]] = {}

    def note(about: str, text: str) -> None:
        if text not in seen.setdefault(about, []):
            seen[about].append(text)

    without_logs = all(run.end_state in ("ok", "not_available") for run in runs)
    for each in facts:
        for place in each.places:
            if place.what == "logs" and without_logs:
                continue  # of runs that failed, and none did
            note(place.what, _lies(place))
        swap = say("governance.swap_on", size=format_bytes(each.swap_bytes)) if each.swap_bytes else None
        note("swap", swap or say("governance.swap_off"))
        dumps = "governance.core_dumps_on" if each.core_dumps else "governance.core_dumps_off"
        note("core_dumps", say(dumps))
        hosts = {"hosts": enumerated(each.contacted or ())} if each.hub == "asked" else {}
        note("hub", say(f"governance.hub_{each.hub.replace(' ', '_')}", **hosts))
        note("sent", say("governance.sent_nothing" if each.sent == "nothing" else "governance.sent_names"))
    known = [
        GovernanceLine(about=say(f"governance.{about}"), text=several_items(texts), seen=True)
        for about, texts in seen.items()
    ]
    asked = [
        GovernanceLine(about=say(f"governance.{key}"), text=say(f"governance.tick_{key}"), seen=False)
        for key in TO_TICK
    ]
    return (*known, *asked)


def _lies(place: Place) -> str:
    text = say(f"governance.in_{place.where}")
    if place.name:
        text = say("governance.named", where=text, name=place.name)
    if place.mode is None:
        return text
    open_to_others = int(place.mode, 8) & 0o044
    key = "mode_open" if open_to_others else "mode"
    return say(f"governance.{key}", where=text, mode=place.mode)
