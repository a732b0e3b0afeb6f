"""What applies a chunk's cores to its matrices: kernel by kernel, then as one CUDA graph.

The thread that brings updates back starts these kernels while that of the model's passes starts others, and
both want the interpreter. Of a step of deepseek-coder 1.3B with 384 tokens (d = 512, H200) 20 of 45 ms went
by while 168 kernels of 15 microseconds each were started, and the other thread waited at each call of its
own. A graph is one call. What changes from step to step lies in a tensor at a fixed place, which its kernels
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engines.cpu_updates.chunks import UpdateStep
from engines.model.graph_capture import capturing
from engines.settings.lsp import LspSettings
from engines.subspace.apply import apply_core, decay_of, is_one_kernel, kernel_numbers
from engines.subspace.core_matrix import CoreMatrix
from engines.subspace.subspaces import Subspace, subspace_seed

_cuda: Any = torch.cuda  # most of it is without annotations


class ChunkApplication:
    """Of the matrices whose cores travel together.

    HAZARD: weights, projectors and the numbers of a step stay at their places. Those of the next step are
    written when the CPU has made its update, so after this step's has been applied.
    """

    def __init__(
        self,
        matrices: Sequence[CoreMatrix],
        settings: LspSettings,
        seed: int,
        *,
        numbers: Tensor,
        on_host: Tensor,
    ) -> None:
        """`seed` is the run's, which rounding depends on. `numbers` (matrices, 4) int32 on the device and
        `on_host`, of its form and pinned where the CPU works behind the GPU, are for what a step's kernels
        are told."""
        self._matrices = matrices
        self._settings = settings
        self._seed = seed
        self._numbers = numbers
        self._on_host = on_host
        self._graph: Any = None
        self._source: int | None = None
        """Address of the directions that the graph reads."""
        self._has_run = False

    @torch.no_grad()
    def __call__(self, directions: Tensor, step: UpdateStep) -> None:
        """W <- W (1 - lr wd) - lr P dS Q^T of each matrix, on the current stream; `directions`, (elements,)
        on the GPU, hold the cores of the chunk."""
        keys = [rounding_key(self._seed, matrix.subspace, step) for matrix in self._matrices]
        rate = step.learning_rate
        told = kernel_numbers(keys, rate, decay_of(rate, self._settings))
        self._on_host.copy_(torch.from_numpy(told))
        self._numbers.copy_(self._on_host, non_blocking=True)
        if self._graph is not None and directions.data_ptr() == self._source:
            self._graph.replay()
            return
        self._enqueue(directions, rate, keys)
        self._has_run = True

    @property
    def can_be_captured(self) -> bool:
        """It has not been, its kernels are loaded, and nothing of it asks the host for a number."""
        kernels = all(is_one_kernel(matrix.subspace) and matrix.residual is None for matrix in self._matrices)
        return self._has_run and self._graph is None and kernels

    @torch.no_grad()
    def capture(self, directions: Tensor) -> None:
        """Be a graph from now on where `directions`, (elements,), are at this place. Waits for the device.
        Other threads may go on applying."""
        with capturing(_cuda.Stream(directions.device), _cuda.graph_pool_handle()) as graph:
            self._enqueue(directions, 0.0, [0] * len(self._matrices))  # its kernels read `_numbers`
        self._source = directions.data_ptr()
        self._graph = graph

    def _enqueue(self, directions: Tensor, rate: float, keys: Sequence[int]) -> None:
        for matrix, key, numbers in zip(self._matrices, keys, self._numbers, strict=True):
            core = matrix.of(directions)
            if matrix.residual is not None:
                matrix.residual.follow(core)
            # HAZARD: blocks that take turns in a slot share its count of changes, by which autograd would
            # take one block's update for a change of what another has saved; `data` does not count.
            weight = matrix.subspace.weight.data
            apply_core(matrix.subspace, weight, core, rate, self._settings, key, numbers)


def rounding_key(seed: int, subspace: Subspace, step: UpdateStep) -> int:
    """32 bits, of which the rounding of a matrix's update in a step is drawn."""
    return subspace_seed(seed, subspace.name, step.number) & 0xFFFFFFFF
