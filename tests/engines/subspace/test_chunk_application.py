"""What applies a chunk's cores: as `apply_core` does, matrix by matrix, also as a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engines.cpu_updates.chunks import UpdateStep
from engines.settings.lsp import LspSettings
from engines.shapes import Workload
from engines.subspace.apply import apply_core, decay_of, kernel_numbers
from engines.subspace.chunk_application import ChunkApplication, rounding_key
from engines.subspace.core_matrix import CoreMatrix, core_matrices
from engines.subspace.projector import random_block_projector
from engines.subspace.subspaces import Subspace

SEED = 11
SETTINGS = LspSettings(d=32, r=4, weight_decay=0.1)
SHAPES = ((64, 48), (128, 64), (64, 128))


class NeverCalibrates:
    calibrates = False

    def check(self, matrix: CoreMatrix, gradient: torch.Tensor) -> None:
        raise AssertionError("no projector is tested here")


def matrices(device: str, dtype: torch.dtype) -> list[CoreMatrix]:
    """Of linear layers, whose weights are the same at every call."""
    made = torch.Generator().manual_seed(3)
    subspaces = []
    for index, (rows, columns) in enumerate(SHAPES):
        module = nn.Linear(columns, rows, bias=False)
        module.weight.data = torch.randn(rows, columns, generator=made).to(device, dtype)
        left, right = (
            random_block_projector(size, 32, 4, index).cast(dtype, device) for size in (rows, columns)
        )
        subspaces.append(
            Subspace(
                name=f"layer {index}", block=0, module=module, weight=module.weight, left=left, right=right
            )
        )
    core = torch.zeros(len(SHAPES) * 32 * 32, dtype=dtype, device=device)
    workload = Workload(batch_size=1, seq_len=8, dtype="bf16")
    return core_matrices(subspaces, core, None, NeverCalibrates(), workload, 0.0, iter(()))


def application(members: list[CoreMatrix], device: str) -> ChunkApplication:
    pins = device != "cpu"
    return ChunkApplication(
        members,
        SETTINGS,
        SEED,
        numbers=torch.zeros(len(members), 4, dtype=torch.int32, device=device),
        on_host=torch.zeros(len(members), 4, dtype=torch.int32, pin_memory=pins),
    )


def assert_as_one_by_one(device: str, dtype: torch.dtype, *, captured_after: int | None) -> None:
    """Five steps with directions, rates and keys of their own, from a slot that stays."""
    members, others = matrices(device, dtype), matrices(device, dtype)
    applied = application(members, device)
    slot = torch.zeros(len(SHAPES) * 32 * 32, dtype=dtype, device=device)
    draws = torch.Generator().manual_seed(5)
    for number in range(5):
        if number == captured_after:
            assert applied.can_be_captured
            applied.capture(slot)
            assert not applied.can_be_captured
        slot.copy_(torch.randn(slot.shape, generator=draws))
        step = UpdateStep(number=number, learning_rate=0.1 / (1 + number))
        applied(slot, step)
        for matrix in others:
            key = rounding_key(SEED, matrix.subspace, step)
            weight = matrix.subspace.weight.data
            apply_core(matrix.subspace, weight, matrix.of(slot), step.learning_rate, SETTINGS, key)
        for one, other in zip(members, others, strict=True):
            assert torch.equal(one.subspace.weight, other.subspace.weight), number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_matrices_of_a_chunk_are_moved(dtype: torch.dtype) -> None:
    assert_as_one_by_one("cpu", dtype, captured_after=None)


def test_nothing_is_captured_on_a_cpu() -> None:
    applied = application(matrices("cpu", torch.float32), "cpu")
    assert not applied.can_be_captured
    applied(torch.zeros(len(SHAPES) * 32 * 32), UpdateStep(number=0, learning_rate=0.1))
    assert not applied.can_be_captured


@pytest.mark.gpu
@pytest.mark.parametrize("captured_after", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_applies_the_same_bits(dtype: torch.dtype, captured_after: int | None) -> None:
    assert_as_one_by_one("cuda:0", dtype, captured_after=captured_after)


@pytest.mark.gpu
def test_another_place_is_not_read_by_the_graph() -> None:
    members, others = (matrices("cuda:0", torch.bfloat16) for _ in range(2))
    applied, beside = application(members, "cuda:0"), application(others, "cuda:0")
    slot = torch.zeros(len(SHAPES) * 32 * 32, dtype=torch.bfloat16, device="cuda:0")
    for step in range(3):
        if step == 1:
            applied.capture(slot)
        directions = torch.randn(slot.shape, generator=torch.Generator().manual_seed(step)).to(slot)
        for each in (applied, beside):
            each(directions, UpdateStep(number=step, learning_rate=0.1))
    for one, other in zip(members, others, strict=True):
        assert torch.equal(one.subspace.weight, other.subspace.weight)


def test_what_a_kernel_is_told() -> None:
    """Rate and decay as fp32 has them, a key of 32 bits, for each matrix."""
    numbers = torch.from_numpy(kernel_numbers([2**32 - 1, 5], 0.1, decay_of(0.1, SETTINGS)))
    assert numbers.shape == (2, 4)
    as_floats = numbers[:, :2].contiguous().view(torch.float32)
    assert as_floats.tolist() == torch.tensor([[0.1, 0.99], [0.1, 0.99]]).tolist()
    assert [int(each) & 0xFFFFFFFF for each in numbers[:, 2]] == [2**32 - 1, 5]
