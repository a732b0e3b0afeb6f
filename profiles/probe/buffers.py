"""Host and device buffers for copies, the data in them checked."""

from __future__ import annotations

from typing import Literal

SMALLEST_BUFFER_BYTES = 2**20


class Buffers:
    """A host and a device buffer for each direction on the current CUDA device: both can be in flight.

    Each direction's bytes are a pattern without a short period, so that a copy that went astray shows.
    """

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        import torch

        self.num_bytes = num_bytes
        self.host_up, self.host_down = (
            torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)
        )
        self.device_up, self.device_down = (
            torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)
        )
        # First touch.
        words = self.host_up.view(torch.int32)
        torch.arange(words.numel(), dtype=torch.int32, out=words)
        self.host_down.zero_()
        self.device_up.zero_()
        self.device_down.copy_(self.host_up)
        torch.cuda.synchronize()

    def up(self) -> None:
        self.device_up.copy_(self.host_up, non_blocking=True)

    def down(self) -> None:
        self.host_down.copy_(self.device_down, non_blocking=True)

    def forget(self, direction: Literal["h2d", "d2h"]) -> None:
        """Overwrite what copies in `direction` write, so that `check` sees only later ones."""
        import torch

        (self.device_up if direction == "h2d" else self.host_down).zero_()
        torch.cuda.synchronize()

    def check(self, direction: Literal["h2d", "d2h"]) -> None:
        """Raises `RuntimeError` if what the copy in `direction` wrote is not what it read."""
        import torch

        torch.cuda.synchronize()
        if direction == "h2d":
            self.host_down.copy_(self.device_up)
        if not torch.equal(self.host_down, self.host_up):
            raise RuntimeError(f"a copy ({direction}, {self.num_bytes} bytes) changed the data")


def largest_buffers(num_bytes: int, memory_bytes: int, *, pinned: bool) -> Buffers:
    """Buffers of `num_bytes`, or smaller where memory or a limit on pinned memory (WSL2) asks for it.

    Sizes are powers of two: torch's pinned allocator rounds up to one. `memory_bytes` is the most host memory
    they may take. Raises what the smallest raised.
    """
    import torch

    free_bytes = torch.cuda.mem_get_info()[0]
    while num_bytes > SMALLEST_BUFFER_BYTES and (2 * num_bytes > memory_bytes or 4 * num_bytes > free_bytes):
        num_bytes //= 2
    while True:
        try:
            return Buffers(num_bytes, pinned=pinned)
        except (RuntimeError, MemoryError):
            if num_bytes <= SMALLEST_BUFFER_BYTES:
                raise
        # Only here, after the handler: the traceback kept alive what had been allocated.
        num_bytes = max(num_bytes // 4, SMALLEST_BUFFER_BYTES)
        free()


def free() -> None:
    """Give device memory, and pinned memory where this torch can, back to the system."""
    import torch

    torch.cuda.synchronize()
    # Products leave a workspace behind for each stream that they ran on.
    clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear_workspaces is not None:
        clear_workspaces()
    torch.cuda.empty_cache()
    empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)
    if empty_host_cache is not None:
        empty_host_cache()
