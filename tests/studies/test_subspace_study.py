"""The study of what projectors leave out, and of carried ones: variants against what is known, tables against
rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import carried_projectors
import subspace_study
from subspace_study import HIDDEN, VARIANTS, Matrix, Variant, best_rate, evened, sizes

ROWS = json.loads((Path(__file__).parent / "subspaces" / "subspace.json").read_text())


def stepped(variant: Variant, d: int, steps: int = 3) -> nn.Parameter:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8))
    matrix = Matrix(weight, d, variant)
    for number in range(steps):
        weight.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(number))
        matrix.step(number, 0.1)
    return weight


def test_nothing_is_left_out_of_a_whole_matrix() -> None:
    whole = Variant(name="", share=1.0, exact=True, one_sided=False)
    # P (12, 8) and Q (8, 8): of 12 rows all that the gradient has.
    with_residual = Variant(name="", share=1.0, exact=True, residual=1.0)
    assert torch.allclose(stepped(whole, 8, 1), stepped(with_residual, 8, 1), atol=1e-5)


def test_a_late_ratio_leaves_the_first_step_as_it_is() -> None:
    plain, late = (Variant(name="", share=0.5, residual=x, late=True) for x in (0.0, 1.0))
    assert torch.equal(stepped(plain, 4, 1), stepped(late, 4, 1))
    assert not torch.equal(stepped(plain, 4, 2), stepped(late, 4, 2))


def test_evening_keeps_the_length() -> None:
    matrix = torch.randn(6, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0])
    found = evened(matrix)
    assert float(found.norm()) == pytest.approx(float(matrix.norm()), rel=1e-5)
    assert float(found.norm(dim=1).std()) < 1e-5 * float(found.norm())


def test_sizes_by_spectrum_have_no_more_elements() -> None:
    model = subspace_study.decoder()
    named = {n: w for n, w in model.named_parameters() if ".layers." in n and w.dim() == 2}
    ids = torch.randint(256, (2, 16))
    variant = next(each for each in VARIANTS if each.by_spectrum)
    found = sizes(named, variant, model, ids)
    d = round((variant.share or 0) * HIDDEN)
    assert 0.9 * len(named) * d * d < sum(each * each for each in found.values()) <= len(named) * d * d


def test_the_table_is_of_all_that_was_run() -> None:
    told = subspace_study.table(ROWS)
    for variant in VARIANTS:
        assert f"| {variant.name} |" in told
        rate = best_rate(ROWS["rows"], variant.name)
        seeds = {row["seed"] for row in ROWS["rows"] if (row["variant"], row["rate"]) == (variant.name, rate)}
        assert seeds == {0, 1, 2}


def test_a_pair_keeps_more_of_its_own_gradient_than_a_random_one() -> None:
    gradients = {"w": torch.randn(32, 16) @ torch.diag(1.0 / torch.arange(1, 17)) @ torch.randn(16, 16)}
    own = carried_projectors.bias_of(carried_projectors.pairs_of(gradients, 0.5), [gradients])
    other = carried_projectors.bias_of(carried_projectors.random_pairs(gradients, 0.5, 0), [gradients])
    assert own < 0.8 * other


def test_a_task_is_read_by_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("\ufeffQuality\ta\tb\n1\tone\ttwo\n0\tthree\tfour\n")
    task = carried_projectors.read_task(f"pairs={path}:1,2:0")
    assert (task.texts, task.labels) == ([["one", "two"], ["three", "four"]], [1, 0])
