"""The families of transformers that engines train: the table of `engines/README.md` is what a sweep finds.

The whole sweep runs with `pytest -m families`; the ordinary run looks at the table's form and at one family
of each kind that was once trained wrongly.
"""

from __future__ import annotations

import pytest
from family_configs import DECODERS, ENCODERS
from family_sweep import README, YES, outcome, written

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "llama": "as most are",
    "albert": "one layer that is called several times",
    "llama4_text": "a router that is a linear layer and more",
    "mpt": "positions with a row for each head",
    "deberta-v2": "blocks that return pairs",
    "deepseek_v3": "a first block without experts",
    "gptj": "a head that looks at the length of its input",
    "gpt_neo": "masks cut out by length",
    "nemotron_h": "no keys and values in some blocks",
}


def test_the_table_is_of_the_sweep() -> None:
    found = written(README.read_text(encoding="utf-8"))
    assert found.keys() == {*DECODERS, *ENCODERS}
    assert len(found) >= 80
    fully = [family for family, each in found.items() if {each.native, each.lsp, each.zeroth_order} == {YES}]
    assert len(fully) >= 80


@pytest.mark.parametrize("family", KINDS)
def test_one_family_of_each_kind_is_as_the_table_has_it(family: str) -> None:
    assert outcome(family) == written(README.read_text(encoding="utf-8"))[family]


@pytest.mark.families
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_every_family_is_as_the_table_has_it(family: str) -> None:
    assert outcome(family) == written(README.read_text(encoding="utf-8"))[family]
