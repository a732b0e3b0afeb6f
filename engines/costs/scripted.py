"""What the scripted engine costs: the bytes that its script tells."""

from __future__ import annotations

from engines.costs.resources.traffic import LayerTraffic, Traffic
from engines.settings.scripted import ScriptedSettings
from engines.shapes import ModelShape, Workload

PROCESS_HOST_BYTES = 150_000_000
"""Python with the harness loaded and no torch."""


def traffic(shape: ModelShape, workload: Workload, settings: ScriptedSettings) -> Traffic:
    return Traffic(
        layers=(LayerTraffic(name="script", h2d_bytes=settings.h2d_bytes, d2h_bytes=settings.d2h_bytes),),
        gpu_memory_bytes={},
        host_memory_bytes={"process": PROCESS_HOST_BYTES, "script": settings.host_allocation_bytes},
        pinned_bytes=settings.pinned_bytes,
    )
