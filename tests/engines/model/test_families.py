"""The families of transformers that engines train: the table of `engines/README.md` is what a sweep finds.

The whole sweep runs with `pytest -m families`; the ordinary run looks at the table's form and at one family
of each kind that was once trained wrongly.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from family_configs import DECODERS, ENCODERS
from family_models import context, family_model
from family_sweep import README, YES, outcome, written
from known_shapes import H200

from engines.errors import UserError
from engines.first_order.adamw import check_checkpointing
from engines.model.model_check import check_block_major, check_driven, check_watched
from engines.settings.parse import defaults
from engines.shapes import NO_RECOMPUTATION, REFUSED_FAMILIES, ROUTER_LOSS, Workload
from harness.models.configs import named_shape
from profiles.planning.recommend import recommend

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


COLUMNS = {
    "native": "native",
    "lsp": "lsp",
    "exact-offload": "exact_offload",
    "mezo": "zeroth_order",
    "zo2": "zeroth_order",
}


@pytest.mark.parametrize("streamed", [False, True])
def test_plans_refuse_what_engines_refuse(streamed: bool) -> None:
    """By the table, which the sweep fills in with what engines say. Streamed, `lsp` goes through blocks as
    `exact-offload` does."""
    table = written(README.read_text(encoding="utf-8"))
    columns = {**COLUMNS, "lsp": "exact_offload"} if streamed else COLUMNS
    given = {"lsp": defaults("lsp").completed(weights="streamed")} if streamed else {}
    bert = named_shape("roberta-base")
    told, said = {}, {}
    named = {family for families in REFUSED_FAMILIES.values() for family in families}
    for family, row in table.items():
        if family not in named and {row.native, row.lsp, row.exact_offload, row.zeroth_order} == {YES}:
            continue  # by neither is there anything to refuse
        # Albert is refused for its calls, all others for their type.
        shape = family_model(family).shape if family == "albert" else replace(bert, family=family)
        for plan in recommend(H200, shape, Workload(batch_size=1, seq_len=8), list(columns), given):
            said[family, plan.engine] = None if plan.available else plan.why_not
            found = getattr(row, columns[plan.engine])
            told[family, plan.engine] = None if found == YES else found
    without = {key: said.pop(key) for key in [("ibert", "lsp")]}
    assert [why is not None and "matrices" in why for why in without.values()] == [True]
    assert said == {key: told[key] for key in said}


@pytest.mark.families
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_every_family_is_as_the_table_has_it(family: str) -> None:
    assert outcome(family) == written(README.read_text(encoding="utf-8"))[family]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_plans_refuse_a_loss_of_experts_as_engines_do(family: str, asked: bool) -> None:
    """The last has the key in its configuration, and no such loss in its model."""
    model = family_model(family, output_router_logits=asked)
    checks = {"lsp": check_watched, "exact-offload": check_block_major, "zo2": check_driven}
    plans = recommend(H200, model.shape, Workload(batch_size=1, seq_len=8), [*checks, "native"], {})
    refused = asked and family != "deepseek_v3"
    for plan in plans:
        if plan.engine == "native" or not refused:
            assert plan.available, (plan.engine, plan.why_not)
        else:
            assert plan.why_not == f"{ROUTER_LOSS}; set output_router_logits to false in config.json"
    for check in checks.values():
        with pytest.raises(UserError, match=ROUTER_LOSS) if refused else nullcontext():
            check(model.blueprint(), context())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["albert", "llama", "xlnet"])
def test_plans_refuse_recomputation_that_transformers_does_not_have(family: str, checkpointing: bool) -> None:
    model = family_model(family)
    work = Workload(batch_size=1, seq_len=8, checkpointing=checkpointing)
    plans = recommend(H200, model.shape, work, ["fsdp2-offload", "torchao-offload", "native"], {})
    refused = checkpointing and family != "llama"
    for plan in plans:
        if plan.engine == "native" or not refused:
            assert plan.available, (plan.engine, plan.why_not)
        else:
            assert plan.why_not == f"{NO_RECOMPUTATION}; use --no-checkpointing"
    with pytest.raises(UserError, match=NO_RECOMPUTATION) if refused else nullcontext():
        check_checkpointing(model.blueprint().model, context(checkpointing=checkpointing))
