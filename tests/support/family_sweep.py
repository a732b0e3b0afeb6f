"""What each engine makes of a family: every outcome is held against transformers' own model.

`python tests/support/family_sweep.py` sweeps over all families of `family_configs` and writes the table of
`engines/README.md`.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from family_configs import DECODERS, ENCODERS
from family_models import FamilyModel, batches, context, family_model
from plain_loop import PlainLoop
from torch import nn

from engines.base import Batch
from engines.decoding import GenerationRequest
from engines.errors import UserError
from engines.methods.exact_offload import ExactOffload
from engines.methods.lsp import Lsp
from engines.methods.mezo import Mezo
from engines.methods.native import Native
from engines.methods.zo2 import Zo2
from engines.settings.exact_offload import ExactOffloadSettings
from engines.settings.first_order import NativeSettings
from engines.settings.lsp import LspSettings
from engines.settings.zeroth_order import MezoSettings, Zo2Settings
from tiny_models import TinyBlueprint

README = Path(__file__).parents[2] / "engines" / "README.md"
BEGIN, END = "<!-- families: written by tests/support/family_sweep.py -->", "<!-- end of families -->"
YES, NO_TEXT = "yes", "-"
EVEN = ((5, 9, 23, 7), (8, 3, 40, 11), (30, 31, 5, 60))
UNEVEN = ((5, 9, 23, 7, 11, 13), (8,), (30, 31, 5))


@dataclass(frozen=True)
class Outcome:
    """`YES`, `NO_TEXT`, or why the family is refused."""

    native: str
    lsp: str
    exact_offload: str
    zeroth_order: str
    """Of mezo and zo2, which are equal."""
    generate: str


HEADINGS = ("`native`", "`lsp`", "`exact-offload`", "`mezo`, `zo2`", "`generate`")


def outcome(family: str) -> Outcome:
    """Raises `AssertionError` where an engine computes something else than transformers' own model."""
    made = family_model(family)
    reference = made.reference()
    _assert_repeats(reference, batches(made.shape, 1)[0])
    return Outcome(
        native=_unless_refused(lambda: _native(made)),
        lsp=_unless_refused(lambda: _lsp(made, reference)),
        exact_offload=_unless_refused(lambda: _exact_offload(made)),
        zeroth_order=_unless_refused(lambda: _zeroth_order(made, reference)),
        generate=_unless_refused(lambda: _generate(made, reference))
        if made.shape.head == "causal_lm"
        else NO_TEXT,
    )


def _unless_refused(work: Callable[[], None]) -> str:
    try:
        work()
    except UserError as error:
        refusal = error
    else:
        return YES
    assert len(str(refusal)) < 200, refusal
    return refusal.why


def _assert_repeats(reference: nn.Module, batch: Batch) -> None:
    """Two forward passes in training mode are equal: nothing is dropped, whatever the family's defaults."""
    reference.train()
    with torch.no_grad():
        one, other = (reference(**batch.inputs).logits for _ in range(2))
    assert torch.equal(one, other)


def _close(one: float, other: float, relative: float = 1e-4) -> bool:
    return abs(one - other) <= relative * max(abs(one), abs(other), 1e-6)


def _native(made: FamilyModel) -> None:
    """Activations are recomputed."""
    engine = Native(NativeSettings(learning_rate=1e-3), context())
    engine.setup(made.blueprint())
    _assert_steps_of_adamw(engine, made)


def _exact_offload(made: FamilyModel) -> None:
    """Weights come up for both passes, and activations are recomputed."""
    engine = ExactOffload(ExactOffloadSettings(learning_rate=1e-3, weights="streamed"), context())
    try:
        engine.setup(made.blueprint())
        _assert_steps_of_adamw(engine, made)
    finally:
        engine.close()


def _assert_steps_of_adamw(engine: Native | ExactOffload, made: FamilyModel) -> None:
    """Losses of three steps are those of a plain loop with torch's AdamW."""
    plain = made.reference().train()
    decayed = [p for p in plain.parameters() if p.dim() >= 2]
    others = [p for p in plain.parameters() if p.dim() < 2]
    groups = [{"params": members, "weight_decay": 0.0} for members in (decayed, others) if members]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for batch in batches(made.shape, 3, padded=True):
        loss = plain(**batch.inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert _close(engine.step([batch]).loss, loss.item())


def _lsp(made: FamilyModel, reference: nn.Module) -> None:
    """The loss of the first step is the model's own; the next ones are those of the twin."""
    data = batches(made.shape, 3, padded=True)
    losses = []
    for offload in (True, False):
        engine = Lsp(LspSettings(d=16, r=2, learning_rate=1e-3, offload=offload), context())
        engine.setup(made.blueprint())
        losses.append([engine.step([batch]).loss for batch in data])
        engine.close()
    assert losses[0] == losses[1]
    assert _close(losses[0][0], _own_loss(reference.train(), data[0]))


def _own_loss(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        loss: float = model(**batch.inputs).loss.item()
    return loss


def _zeroth_order(made: FamilyModel, reference: nn.Module) -> None:
    """Evaluation, losses and projected gradient are those of the model's own forward passes on perturbed
    weights; zo2 equals mezo bit for bit, weights included."""
    data = batches(made.shape, 3, padded=True)
    reference.eval()
    settings = {"learning_rate": 1e-3, "eps": 1e-2}
    mezo, zo2 = Mezo(MezoSettings(**settings), context()), Zo2(Zo2Settings(**settings), context())
    mezo.setup(made.blueprint())
    zo2.setup(made.blueprint())
    try:
        assert _close(mezo.evaluate(data[:1]).loss, _own_loss(reference, data[0]))
        loop = PlainLoop(mezo.settings, TinyBlueprint(made.shape, made.blueprint().model, reference))
        noise = loop.noise(0)
        sides = [loop.loss(noise, by, data[:1]) for by in (1e-2, -1e-2)]
        first = mezo.step(data[:1])
        assert first.loss == zo2.step(data[:1]).loss
        assert _close(first.loss, sum(sides) / 2)
        assert first.projected_gradient is not None
        slope = (sides[0] - sides[1]) / 2e-2
        assert abs(first.projected_gradient - slope) <= 0.02 * abs(slope) + 1e-2
        for batch in data[1:]:
            assert mezo.step([batch]).loss == zo2.step([batch]).loss
        for (name, one), (_, other) in zip(mezo.weights(), zo2.weights(), strict=True):
            assert torch.equal(one, other), name
    finally:
        zo2.close()


def _generate(made: FamilyModel, reference: Any) -> None:
    """Greedy tokens are transformers' own, with and without padding."""
    engine = Mezo(MezoSettings(), context())
    engine.setup(made.blueprint())
    for prompts in (EVEN, UNEVEN):
        found = engine.generate(GenerationRequest(prompts=prompts, max_new_tokens=8))
        rows = [list(row) for row in zip(*[each.tokens for each in found], strict=True)]
        assert rows == _own_tokens(reference.eval(), prompts)


def _own_tokens(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    length = max(len(prompt) for prompt in prompts)
    ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    made = model.generate(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, use_cache=True,
        max_new_tokens=8, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    rows: list[list[int]] = made[:, length:].tolist()
    return rows


def table(found: dict[str, Outcome]) -> str:
    """Families of one outcome share a row, the commonest first."""
    groups: dict[Outcome, list[str]] = {}
    for family in sorted(found):
        groups.setdefault(found[family], []).append(family)
    lines = [
        f"| families, {len(found)} in all | {' | '.join(HEADINGS)} |",
        f"| --- |{' --- |' * len(HEADINGS)}",
    ]
    for kind, families in sorted(groups.items(), key=lambda group: (-len(group[1]), group[1])):
        lines.append(f"| {', '.join(families)} | {' | '.join(astuple(kind))} |")
    return "\n".join(lines)


def written(text: str) -> dict[str, Outcome]:
    """The table in the text of a README. Raises `ValueError` if there is none of this form."""
    inside = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    found: dict[str, Outcome] = {}
    for line in inside.strip().splitlines()[2:]:
        families, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) != len(fields(Outcome)):
            raise ValueError(line)
        found |= dict.fromkeys(re.split(r", ", families), Outcome(*cells))
    return found


def write(found: dict[str, Outcome], path: Path = README) -> None:
    text = path.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(f"{before}\n{table(found)}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    everything: dict[str, Outcome] = {}
    for each in (*DECODERS, *ENCODERS):
        everything[each] = outcome(each)
        print(each, everything[each], file=sys.stderr, flush=True)
    write(everything)
