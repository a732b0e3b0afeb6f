"""Which blocks of a zeroth-order step lie on disk, and what brings them up: for one process, or for several
of a machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from engines.base import Blueprint, Context
from engines.costs.zo2 import choose_on_disk
from engines.offload.disk import DiskBlocks
from engines.offload.disk_files import BlockFiles
from engines.offload.disk_tensors import in_place
from engines.offload.shared_disk import SharedDisk
from engines.offload.spill_place import spill_folder
from engines.quantized.block_form import BlockForm
from engines.settings.zeroth_order import Zo2Settings
from engines.transfer.link import Link
from engines.transfer.trace import Timeline
from engines.world import World

BlocksOnDisk = DiskBlocks | SharedDisk
"""Those of one process, or of several."""


def which_on_disk(
    forms: Sequence[BlockForm], resident: frozenset[int], settings: Zo2Settings, context: Context, host: World
) -> frozenset[int]:
    """Blocks that host memory has no room for, or as many as `settings` say; the same on all ranks, so by the
    least of what each may use. `host` are those that have the others in memory together.

    Raises `InfeasiblePlan` if host memory is too small.
    """
    ranks, host_bytes = context.world, context.host_bytes
    if ranks.size > 1 and settings.disk_blocks == "auto":
        of_ranks = [own for (own,) in ranks.gather([-1 if host_bytes is None else host_bytes])]
        host_bytes = None if min(of_ranks) < 0 else int(min(of_ranks))
    if host_bytes is not None:
        host_bytes *= host.local_size
    return choose_on_disk([form.size_bytes for form in forms], resident, settings.disk_blocks, host_bytes)


def put_on_disk(
    forms: Sequence[BlockForm],
    on_disk: Collection[int],
    settings: Zo2Settings,
    blueprint: Blueprint,
    context: Context,
    link: Link,
    *,
    written_back: Collection[int],
    delay_s: Callable[[], float] | None,
    timeline: Timeline | None,
) -> BlocksOnDisk:
    """Files for the blocks `on_disk`, not filled yet, but for those that a file of the model's own holds as
    they are computed with; and the ring through which they come. `written_back` are those that the run writes
    anew. All ranks of a machine make it together.

    Raises `InfeasiblePlan` if the disk is too small, and `UserError` where its folder cannot be used.
    """
    folder = spill_folder(settings.disk_folder)
    as_stored = {i: forms[i].layout for i in on_disk} if settings.base == "full" else {}
    there = in_place(as_stored, blueprint, context.workload.dtype, forms[0].dtype.itemsize)
    sizes_bytes = {i: forms[i].size_bytes for i in sorted(on_disk)}
    if context.world.local_size > 1:
        return SharedDisk(
            sizes_bytes, folder, link, context.progress, context.world,
            written_back=written_back, in_place=there, delay_s=delay_s, timeline=timeline,
        )  # fmt: skip
    files = BlockFiles(sizes_bytes, folder, written_back=written_back, in_place=there)
    return DiskBlocks(files, link, context.progress, delay_s=delay_s, timeline=timeline)
