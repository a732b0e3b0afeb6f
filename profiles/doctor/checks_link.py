"""Checks of the way between host and GPU."""

from __future__ import annotations

from profiles.display.tables import link_text
from profiles.doctor.findings import Answer, Finding
from profiles.machine import LinkFigures, Machine
from profiles.units import format_rate

LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 15.75e9 / 16, 4: 31.5e9 / 16, 5: 63e9 / 16, 6: 126e9 / 16}
"""By PCI Express generation, before packet overhead (PCI-SIG)."""

LINK_SHARE = 0.7
"""Pinned copies usually reach 80 to 90 % of that."""

PAGEABLE_SHARE = 0.7
"""Pageable copies below this share of pinned ones are worth a word."""

REPLAYS = 10
"""Packets sent again during a probe, above which a contact is bad."""


def check_link_state(link: LinkFigures, _: Machine) -> Answer:
    width, generation = link.width_loaded, link.generation_loaded
    if width is None or generation is None or link.width_max is None or link.generation_max is None:
        return "the link's state under load is not known"
    narrow, slow = width < link.width_max, generation < link.generation_max
    if not narrow and not slow:
        return None
    if narrow:
        cause = "a slot with fewer lanes, a riser, lanes shared with another slot or an SSD, or a bad contact"
        remedy = (
            "move the card to the slot nearest to the CPU, without a riser; see the board's manual for lanes"
        )
    elif link.generation_idle == generation:
        cause = "power saving that does not end under load, or a generation set by hand in the firmware"
        remedy = (
            "in the firmware set the slot's speed to auto and ASPM off; check 'nvidia-smi -q -d PERFORMANCE'"
        )
    else:
        cause = "a riser or slot that does not carry the generation, or a generation set in the firmware"
        remedy = "try without the riser, and set the slot's speed to auto in the firmware"
    return Finding(
        severity="warning",
        title="the link runs below what card and slot can do",
        evidence=f"{link_text(generation, width)} under load, {_best(link)} possible",
        cause=cause,
        remedy=remedy,
    )


def check_slot(link: LinkFigures, _: Machine) -> Answer:
    if link.generation_gpu_max is None or link.generation_slot_max is None:
        return "the slot's and the card's own limits are not known"
    wide = link.width_slot_max is not None and link.width_max is not None
    narrow = wide and (link.width_slot_max or 0) < (link.width_max or 0)
    if link.generation_slot_max >= link.generation_gpu_max and not narrow:
        return None
    return Finding(
        severity="note",
        title="the slot is slower than the card",
        evidence=f"slot {link_text(link.generation_slot_max, link.width_slot_max)}, card "
        f"{link_text(link.generation_gpu_max, link.width_max)}",
        cause="the board's generation, or a slot behind the chipset",
        remedy="use the slot that is wired to the CPU, if the board has a faster one",
    )


def check_link_rate(link: LinkFigures, _: Machine) -> Answer:
    lane = LANE_BYTES_PER_S.get(link.generation_loaded or 0)
    rates = {"to the GPU": link.h2d_pinned_bytes_per_s, "from the GPU": link.d2h_pinned_bytes_per_s}
    measured = {way: figure.value for way, figure in rates.items() if figure.origin == "measured"}
    if lane is None or link.width_loaded is None or not measured:
        return "pinned rates, or the link's state under load, were not measured"
    whole = lane * link.width_loaded
    way, rate = min(measured.items(), key=lambda item: item[1] or 0.0)
    if rate is None or rate >= LINK_SHARE * whole:
        return None
    return Finding(
        severity="warning",
        title="pinned copies are slow for this link",
        evidence=f"{format_rate(rate)} {way}, {rate / whole:.0%} of {format_rate(whole)} "
        f"({link_text(link.generation_loaded, link.width_loaded)}); 80 to 90 % are usual",
        cause="host memory far from the GPU (another NUMA node), an IOMMU or a virtual machine in between, "
        "or other traffic on the same lanes",
        remedy="run under 'numactl --cpunodebind=N --membind=N' with the GPU's node N ('nvidia-smi topo "
        "-m'), and probe again on an idle machine",
    )


def check_replays(link: LinkFigures, _: Machine) -> Answer:
    if link.replays is None:
        return "the replay counter is not known"
    if link.replays <= REPLAYS:
        return None
    return Finding(
        severity="warning",
        title="packets on the link were sent again",
        evidence=f"{link.replays} replays during the probe",
        cause="a bad contact, a riser, or a generation that the board does not carry cleanly",
        remedy="seat the card again, leave out the riser, or set the slot one generation lower",
    )


def check_pageable(link: LinkFigures, _: Machine) -> Answer:
    pairs = {
        "to the GPU": (link.h2d_pageable_bytes_per_s.value, link.h2d_pinned_bytes_per_s.value),
        "from the GPU": (link.d2h_pageable_bytes_per_s.value, link.d2h_pinned_bytes_per_s.value),
    }
    known = {way: (slow, fast) for way, (slow, fast) in pairs.items() if slow is not None and fast}
    if not known:
        return "pinned and pageable rates were not both measured"
    way, (slow, fast) = min(known.items(), key=lambda item: item[1][0] / item[1][1])
    if slow >= PAGEABLE_SHARE * fast:
        return None
    return Finding(
        severity="note",
        title="copies of memory that is not pinned are slow, and pinning is possible",
        evidence=f"{way} {format_rate(slow)} pageable, {format_rate(fast)} pinned",
        cause="the driver stages pageable memory through a small buffer of its own, which is so everywhere",
        remedy="the engines pin what they copy; in code of your own, pin once in advance (pin_memory=True)",
    )


def _best(link: LinkFigures) -> str:
    return link_text(link.generation_max, link.width_max)
