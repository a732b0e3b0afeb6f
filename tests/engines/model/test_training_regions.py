"""What is said where nothing can be compiled."""

from __future__ import annotations

import pytest
import torch

from engines.model import training_regions
from engines.model.training_regions import compiles, why_not_compiled

GPU = torch.device("cuda")


def test_a_cpu_compiles_where_it_is_asked_to() -> None:
    assert why_not_compiled(torch.device("cpu")) is None
    assert compiles(True, torch.device("cpu"))
    assert not compiles("auto", torch.device("cpu"))


@pytest.mark.parametrize(("missing", "told"), [("find_spec", "Triton"), ("which", "C compiler")])
def test_a_gpu_needs_triton_and_a_compiler(missing: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_regions, "find_spec", lambda name: object())
    monkeypatch.setattr(training_regions, "which", lambda name: "/usr/bin/cc")
    assert why_not_compiled(GPU) is None
    assert compiles("auto", GPU)
    monkeypatch.setattr(training_regions, missing, lambda name: None)
    assert told in str(why_not_compiled(GPU))
    assert not compiles("auto", GPU)
