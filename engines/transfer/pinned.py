"""Host memory of an exact size that a GPU can copy from at full speed."""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.transfer.clock import torch_cuda

TOUCH_CHUNK_BYTES = 2**30
"""Host memory is touched in chunks of this size, for its progress to be seen."""


class PageableMemoryWarning(UserWarning):
    """Host memory could not be pinned; copies are slower and do not overlap compute."""


class HostSlab:
    """One mapping of host memory of an exact size, page-aligned, pinned if `device` is a CUDA device.

    torch's own pinned allocator rounds up to a power of two, up to twice what is needed; a mapping that
    is registered with the driver is rounded to a page.

    If the driver refuses to pin (a limit on locked memory, not enough memory), the slab stays pageable,
    `pinned` is False, and one `PageableMemoryWarning` says what that costs. Fresh memory reads as zeros.
    """

    def __init__(
        self,
        num_bytes: int,
        device: torch.device,
        progress: ReportProgress | None = None,
        *,
        pin: bool = True,
        mapping: mmap.mmap | None = None,
    ) -> None:
        """`mapping` is memory that is there already, whole and touched; else it is made."""
        if num_bytes <= 0:
            raise ValueError("a slab needs a positive number of bytes")
        self.num_bytes = num_bytes
        self.pinned = False
        touched = mapping is not None
        if mapping is None:
            # Private: shared mappings get no huge pages and are counted as shared memory by the cgroup.
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            # HAZARD: after a fork, a write to a private page may move the parent to a copy while the GPU
            # goes on with the old one. DONTFORK keeps the mapping out of children.
            _advise(mapping, advice)
        self._memory: Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)
        self._unregister: weakref.finalize[[int], HostSlab] | None = None
        if device.type == "cuda" and pin:
            if not touched:
                self._touch(progress)
            self._pin(device)

    def _touch(self, progress: ReportProgress | None) -> None:
        assert self._memory is not None
        what = "touching host memory to pin (bytes)"
        for start in range(0, self.num_bytes, TOUCH_CHUNK_BYTES):
            chunk = self._memory[start : start + TOUCH_CHUNK_BYTES]
            chunk.fill_(0)  # with all threads; the driver would touch the pages with one
            if progress is not None:
                progress(what, start + chunk.numel(), self.num_bytes)

    def _pin(self, device: torch.device) -> None:
        assert self._memory is not None
        torch_cuda.init()
        # HAZARD: one registration for the whole mapping. The driver refuses a copy that begins in one
        # registration and ends in another (cudaErrorInvalidValue), and a view may lie anywhere.
        pointer = self._memory.data_ptr()
        with torch_cuda.device(device):
            error = _register(pointer, self.num_bytes)
        if error is not None:
            _clear_cuda_error(device)
            warnings.warn(
                f"{self.num_bytes / 1e9:.1f} GB of host memory cannot be pinned ({error}): copies to "
                "and from the GPU go through a staging buffer, several times slower (on an H200 machine "
                "seven times up and four times down) and without overlap; raise the limit on locked memory "
                "(ulimit -l) or free host memory",
                PageableMemoryWarning,
                stacklevel=4,
            )
            return
        self.pinned = True
        # HAZARD: memory must not be unmapped while registered, or a later mapping at the same address
        # cannot be pinned. The finalizer runs before the mapping goes, also without `close`.
        self._unregister = weakref.finalize(self, _unregister, pointer)

    def view(self, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the slab's memory. Raises `ValueError` outside the slab or off the dtype's grid."""
        if self._memory is None:
            raise ValueError("the slab is closed")
        size_bytes = prod(shape) * dtype.itemsize
        if offset_bytes < 0 or offset_bytes + size_bytes > self.num_bytes or offset_bytes % dtype.itemsize:
            raise ValueError(
                f"{size_bytes} bytes at {offset_bytes} do not lie in a slab of {self.num_bytes} bytes "
                f"on a multiple of {dtype.itemsize}"
            )
        return self._memory[offset_bytes : offset_bytes + size_bytes].view(dtype).view(*shape)

    def close(self) -> None:
        """Unpin. The memory goes when the last view goes. The caller has waited for all copies."""
        if self._unregister is not None:
            self._unregister()
            self._unregister = None
        self.pinned = False
        self._memory = None


SLAB_BYTES = 4 * 2**30
"""Tensors share a slab up to about this size, so that pinning a large model shows its progress."""


class HostSlabs:
    """Byte tensors of exact sizes in as few pinned slabs as have about `SLAB_BYTES` each."""

    def __init__(self, slabs: Sequence[HostSlab], views: Sequence[Tensor]) -> None:
        self._slabs = list(slabs)
        self.views = list(views)
        self.pinned_bytes = sum(slab.num_bytes for slab in slabs if slab.pinned)

    def close(self) -> None:
        """Unpin; see `HostSlab.close`."""
        self.views.clear()
        for slab in self._slabs:
            slab.close()


def in_slabs(sizes_bytes: Sequence[int]) -> list[list[int]]:
    """Neighbours that share a slab."""
    groups: list[list[int]] = []
    for size in sizes_bytes:
        if not groups or sum(groups[-1]) + size > SLAB_BYTES:
            groups.append([])
        groups[-1].append(size)
    return groups


def host_slabs(sizes_bytes: Sequence[int], device: torch.device, progress: ReportProgress) -> HostSlabs:
    """Memory for tensors of these sizes, each on one slab: a copy may not cross from one to another.

    Once the driver has refused to pin, the rest stays pageable without another warning.
    """
    groups = in_slabs(sizes_bytes)
    total, done, pin = sum(sizes_bytes), 0, True
    slabs: list[HostSlab] = []
    views: list[Tensor] = []
    for group in groups:
        before = done

        def report(what: str, count: int, of: int, before: int = before) -> None:
            progress(what, before + count, total)

        slab = HostSlab(sum(group), device, report, pin=pin)
        pin = pin and (slab.pinned or device.type != "cuda")
        slabs.append(slab)
        offset = 0
        for size in group:
            views.append(slab.view(offset, (size,), torch.uint8))
            offset += size
        done += offset
    return HostSlabs(slabs, views)


def _advise(mapping: mmap.mmap, advice: str) -> None:
    option = getattr(mmap, advice, None)
    if option is None:
        return
    try:
        mapping.madvise(option)
    except OSError:
        return  # an advice; kernels without it refuse


def _register(pointer: int, num_bytes: int) -> str | None:
    """Pin host memory. The driver's reason if it refuses."""
    runtime = torch_cuda.cudart()
    code = int(runtime.cudaHostRegister(pointer, num_bytes, 0))
    return None if code == 0 else f"CUDA error {code}"


def _unregister(pointer: int) -> None:
    torch_cuda.cudart().cudaHostUnregister(pointer)


def _clear_cuda_error(device: torch.device) -> None:
    """Take the runtime's last error away, which torch would blame on its next kernel.

    torch offers no cudaGetLastError; the check after any launch reads and resets it.
    """
    try:
        torch.zeros(1, device=device).add_(1)
    except RuntimeError:
        return
