"""Host and device buffers for copies, the data in them checked."""

from __future__ import annotations

from typing import Any

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

    def part(self, direction: str, num_bytes: int) -> tuple[Any, Any]:
        """(target, source) of a copy of the first `num_bytes`: `target.copy_(source, non_blocking=True)`."""
        pair = (self.device_up, self.host_up) if direction == "h2d" else (self.host_down, self.device_down)
        return pair[0][:num_bytes], pair[1][:num_bytes]

    def forget(self, direction: str, num_bytes: int) -> None:
        """Overwrite the target of `part`, so that `check` sees only what is copied after this."""
        import torch

        self.part(direction, num_bytes)[0].zero_()
        torch.cuda.synchronize()

    def check(self, direction: str, num_bytes: int) -> None:
        """Raises `RuntimeError` if the target of `part` does not hold its source's bytes."""
        import torch

        torch.cuda.synchronize()
        arrived = self.host_down[:num_bytes]
        if direction == "h2d":
            arrived.copy_(self.device_up[:num_bytes])
        if not torch.equal(arrived, self.host_up[:num_bytes]):
            raise RuntimeError(f"a copy ({direction}, {num_bytes} bytes) changed the data")


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
