"""A plan for generating: how many blocks stay on the GPU, whether it fits, and what a step would take. No
torch."""

from __future__ import annotations

from dataclasses import replace

from engines.costs.decoding import Decoding, least_gpu_bytes, traffic
from engines.settings.given import GivenSettings
from engines.settings.zeroth_order import Base, Zo2Settings, check_blocks
from engines.shapes import ModelShape
from profiles.machine import Machine
from profiles.planning.budget import Budget, gpu_bytes_needed, num_on_disk, why_missing
from profiles.planning.plan import Plan
from profiles.planning.predict import predict


def fitting(
    engine: str, shape: ModelShape, decoding: Decoding, given: GivenSettings, budget: Budget
) -> tuple[GivenSettings, str | None]:
    """The settings to generate with, and why they do not fit or `None`.

    Unless it is set, an engine that streams blocks keeps as many on the GPU as fit: every one that does makes
    each step faster. Where the user named no limit a share of the GPU stays free. Blocks that host memory has
    no room for are on disk. Matrices of bf16 come up as lossless tiles if any block does: a token waits for
    the link, and bits are the same. Raises `UserError` for more blocks than the model has.
    """
    whole = _placed(engine, shape, decoding, given, budget)
    typed = whole[0].typed
    if not isinstance(typed, Zo2Settings) or "base" in given or decoding.dtype != "bf16":
        return whole
    if budget.gpu_bytes is None or typed.resident_blocks == shape.num_blocks:
        return whole
    fewer = _placed(engine, shape, decoding, given.completed(base="lossless"), budget)
    return fewer if fewer[1] is None else whole


def _placed(
    engine: str, shape: ModelShape, decoding: Decoding, given: GivenSettings, budget: Budget
) -> tuple[GivenSettings, str | None]:
    """`fitting` for the base that is given."""
    check_blocks(engine, given.typed, shape.name, shape.num_blocks)
    settings = given
    if isinstance(given.typed, Zo2Settings):
        typed: Zo2Settings = given.typed
        usable = budget.fillable_gpu_bytes
        if "resident_blocks" not in given and usable is not None:
            resident = next(
                (
                    count
                    for count in range(shape.num_blocks - typed.named_disk_blocks, 0, -1)
                    if gpu_bytes_needed(
                        traffic(shape, decoding, replace(typed, resident_blocks=count)), budget
                    )
                    <= usable
                ),
                0,
            )
            settings = settings.replaced(resident_blocks=resident)
        if "disk_blocks" not in given or typed.disk_blocks == "auto":
            without = replace(settings.typed, disk_blocks=0)
            if on_disk := num_on_disk(traffic(shape, decoding, without), budget):
                settings = settings.replaced(disk_blocks=on_disk)
    return settings, why_missing(traffic(shape, decoding, settings.typed), budget)


def plan_generation(
    engine: str, machine: Machine, shape: ModelShape, decoding: Decoding, given: GivenSettings, budget: Budget
) -> Plan:
    """The plan of a measured generation; a step is one token of every sequence. Raises as `fitting` does."""
    settings, why_not = fitting(engine, shape, decoding, given, budget)
    prediction = predict(traffic(shape, decoding, settings.typed), machine, decoding.step)
    return Plan(
        engine=engine,
        settings=settings,
        fits=why_not is None,
        why_not=why_not,
        prediction=replace(
            prediction, floor_s=_floor_s(prediction.floor_s, shape, decoding, settings.typed.base, machine)
        ),
    )


def _floor_s(
    floor_s: float | None, shape: ModelShape, decoding: Decoding, base: Base, machine: Machine
) -> float | None:
    """The largest of uploads, arithmetic, and one read of weights and cache from the GPU's memory, each at
    the rate that was measured for it alone."""
    rate = None if machine.gpu is None else machine.gpu.copy_bytes_per_s.value
    if floor_s is None or not rate:
        return floor_s
    return max(floor_s, least_gpu_bytes(shape, decoding, base) / rate)
