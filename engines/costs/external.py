"""What another trainer costs: nothing that this program knows."""

from __future__ import annotations

from engines.costs.resources.traffic import LayerTraffic, Traffic
from engines.settings.external import ExternalSettings
from engines.shapes import ModelShape, Workload


def traffic(shape: ModelShape, workload: Workload, settings: ExternalSettings) -> Traffic:
    """Nothing: what it takes is measured and not predicted."""
    return Traffic(layers=(LayerTraffic(name="external"),), gpu_memory_bytes={}, host_memory_bytes={})
