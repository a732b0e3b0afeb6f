"""A plan for generating: how many blocks stay on the GPU, whether it fits, and what a step would take. No
torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from engines.costs.decoding import Decoding, least_gpu_bytes, traffic
from engines.costs.disk import fewest_on_disk
from engines.costs.traffic import Traffic
from engines.settings.parse import parse_settings
from engines.settings.zeroth_order import Base, check_blocks
from engines.shapes import ModelShape
from profiles.machine import Machine
from profiles.planning.budget import FREE_SHARE, Budget, gpu_bytes_needed, host_bytes_needed, why_missing
from profiles.planning.plan import Plan, Value
from profiles.planning.predict import predict

GENERATING = ("zo2", "mezo")
"""Engines that generate."""


def fitting(
    engine: str, shape: ModelShape, decoding: Decoding, override: Mapping[str, object], budget: Budget
) -> tuple[dict[str, Value], str | None]:
    """The settings to generate with, and why they do not fit or `None`.

    Unless it is set, `zo2` keeps as many blocks on the GPU as fit: every one that does makes each step
    faster. Where the user named no limit a share of the GPU stays free. Blocks that host memory has no room
    for are on disk. Raises `UserError` for a setting that the engine does not have, and for more blocks than
    the model has.
    """
    given = parse_settings(engine, override)
    check_blocks(engine, given, shape.name, shape.num_blocks)
    chosen = cast(dict[str, Value], dict(override))
    if engine != "zo2":
        return chosen, why_missing(_cost(engine, shape, decoding, chosen), budget)
    if "resident_blocks" not in override and budget.gpu_bytes is not None:
        usable = int(budget.gpu_bytes * (1 if budget.gpu_named else 1 - FREE_SHARE))
        most = shape.num_blocks - given.named_disk_blocks
        chosen["resident_blocks"] = next(
            (
                count
                for count in range(most, 0, -1)
                if gpu_bytes_needed(_cost(engine, shape, decoding, {**chosen, "resident_blocks": count}))
                <= usable
            ),
            0,
        )
    if chosen.get("disk_blocks", "auto") == "auto":
        on_disk = _fewest_on_disk(_cost(engine, shape, decoding, {**chosen, "disk_blocks": 0}), budget)
        if on_disk:
            chosen["disk_blocks"] = on_disk
    return chosen, why_missing(_cost(engine, shape, decoding, chosen), budget)


def _fewest_on_disk(cost: Traffic, budget: Budget) -> int:
    """Blocks that host memory has no room for; `cost` is that of none on disk."""
    block_bytes = max(layer.h2d_bytes for layer in cost.layers)
    if not block_bytes:
        return 0
    others_bytes = host_bytes_needed(cost, budget) - cost.pinned_bytes
    streamed = cost.pinned_bytes // block_bytes
    return fewest_on_disk([block_bytes] * streamed, budget.host_bytes - others_bytes)


def plan_generation(
    engine: str,
    machine: Machine,
    shape: ModelShape,
    decoding: Decoding,
    override: Mapping[str, object],
    budget: Budget,
) -> Plan:
    """The plan of a measured generation; a step is one token of every sequence. Raises as `fitting` does."""
    settings, why_not = fitting(engine, shape, decoding, override, budget)
    told = predict(_cost(engine, shape, decoding, settings), machine, decoding.step)
    base = parse_settings(engine, settings).base
    return Plan(
        engine=engine,
        settings=settings,
        fits=why_not is None,
        why_not=why_not,
        prediction=replace(told, floor_s=_floor_s(told.floor_s, shape, decoding, base, machine)),
    )


def _cost(engine: str, shape: ModelShape, decoding: Decoding, settings: Mapping[str, Any]) -> Traffic:
    return traffic(shape, decoding, parse_settings(engine, settings))


def _floor_s(
    floor_s: float | None, shape: ModelShape, decoding: Decoding, base: Base, machine: Machine
) -> float | None:
    """The largest of uploads, arithmetic, and one read of weights and cache from the GPU's memory, each at
    the rate that was measured for it alone."""
    rate = None if machine.gpu is None else machine.gpu.copy_bytes_per_s.value
    if floor_s is None or not rate:
        return floor_s
    return max(floor_s, least_gpu_bytes(shape, decoding, base) / rate)
