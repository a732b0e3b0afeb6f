"""What a method learned, as a report says it: beside what the model did before, and beside native. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engines import YARDSTICK
from harness.records.run import Run
from harness.records.stats import Rounds
from reports.format import loss, span
from reports.judging.ranking import difference_word, loss_beside
from reports.measured.examples import OverExamples, OverSequences, loss_over_sequences, over_examples
from reports.measured.measurements import Measurements, is_random, typical
from reports.messages import say

Field = Callable[[Run], float | None]


def accuracy(share: float | None) -> str:
    """`81.2 %`."""
    return say("show.nothing") if share is None else f"{100 * share:.1f} %"


_KINDS: tuple[tuple[str, Field, Field, Callable[[float | None], str]], ...] = (
    (
        "accuracy",
        lambda run: run.summary.eval_accuracy_first,
        lambda run: run.summary.eval_accuracy_last,
        accuracy,
    ),
    ("heldout_loss", lambda run: run.summary.eval_loss_first, lambda run: run.summary.eval_loss_last, loss),
)
"""Key, before, after, and how it is shown; the first that was measured is told, of a text the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityReached:
    """Of one method, on data that was not trained on, medians over its runs."""

    kind: str
    """What is told: `accuracy` or `heldout_loss`."""
    before: str
    """Zero-shot: before the first step."""
    after: str
    native: str
    """Native's after its last step; empty where it is not known, or is this one."""
    beside: str = ""
    """What the loss is more than native's on the same sequences; empty where that is not known."""
    examples: str = ""
    """Of how many examples accuracy is, or sequences the loss, with the interval over them; empty where they
    were not counted."""
    majority: str = ""
    """Share of the most frequent class; empty where it is not known."""
    is_guessing: bool = False
    """What `after` may be of other examples reaches down to that share."""
    fell: bool = False
    """Accuracy is lower than before the first step."""

    @property
    def told(self) -> str:
        """`after`, with `examples`."""
        return say("quality.told", value=self.after, examples=self.examples) if self.examples else self.after


def learned(engine: str, all_: Measurements, *, of_random_weights: bool = False) -> QualityReached | None:
    """`None` where nothing was evaluated, or on random data alone; and of random weights, which tell nothing
    of the real model, unless that is asked for."""
    rounds, native = all_.of(engine), all_.of(YARDSTICK)
    if not rounds.ok or is_random(rounds.ok[0]):
        return None
    if rounds.ok[0].model.random_weights and not of_random_weights:
        return None
    for kind, first, last, show in reversed(_KINDS) if _is_text(rounds) else _KINDS:
        after, others = typical(rounds, last), typical(native, last)
        if after is not None:
            examples = over_examples(rounds) if kind == "accuracy" else None
            sequences = loss_over_sequences(rounds) if kind == "heldout_loss" else None
            majority = examples.majority_class if examples else None
            began = typical(rounds, first)
            return QualityReached(
                kind=kind,
                before=show(began),
                after=show(after),
                native="" if engine == YARDSTICK or others is None else show(others),
                beside=beside_native_text(engine, all_) if kind == "heldout_loss" else "",
                examples=examples_text(examples) if examples else sequences_text(sequences),
                majority="" if majority is None else accuracy(majority),
                is_guessing=examples is not None and majority is not None and examples.low <= majority,
                fell=kind == "accuracy" and began is not None and after < began,
            )
    return None


def examples_text(examples: OverExamples) -> str:
    """`of 32 examples (95 %: 64.7 to 91.1 %)`."""
    range_ = span(accuracy(examples.low), accuracy(examples.high))
    return say("quality.examples", count=f"{examples.count:,}", range=range_)


def _is_text(rounds: Rounds) -> bool:
    """Whether labels are the tokens of a text, of which the loss is told: known where those of each sequence
    were kept."""
    return any(max(run.summary.eval_sequence_labels, default=0) > 1 for run in rounds.ok)


def sequences_text(found: OverSequences | None) -> str:
    """`of 64 sequences (95 %: 2.0210 to 2.1830)`; empty for none."""
    if found is None:
        return ""
    range_ = span(loss(found.low), loss(found.high))
    return say("quality.sequences", count=f"{found.count:,}", range=range_)


def beside_native_text(engine: str, all_: Measurements) -> str:
    """`+0.0213 (95 %: -0.0100 to +0.0526; undecided)`; empty of native, and where it is not known."""
    found = None if engine == YARDSTICK else loss_beside(engine, YARDSTICK, all_)
    if found is None:
        return ""
    value, low, high = (f"{each:+.4f}" for each in (found.value, found.low, found.high))
    return say(
        "quality.beside", value=value, range=span(low, high), word=say(f"quality.{difference_word(found)}")
    )


def why_unknown(engine: str, all_: Measurements) -> str:
    """Why nothing is known of what it learned."""
    rounds = all_.of(engine)
    if rounds.ok and is_random(rounds.ok[0]):
        return say("note.random_data")
    if rounds.ok and rounds.ok[0].model.random_weights:
        return say("note.random_weights")
    return say("note.no_evaluation")


def learned_text(found: QualityReached) -> str:
    """`accuracy 81.2 % of 32 examples (95 %: 64.7 to 91.1 %) on held-out data; before training 50.0 %`."""
    native = say("quality.native", value=found.native) if found.native else ""
    if found.beside:
        native = say("quality.native_beside", value=found.native, difference=found.beside)
    return say(
        f"quality.{found.kind}", after=found.told, before=found.before, native=majority_text(found) + native
    )


def majority_text(found: QualityReached) -> str:
    """`; the most frequent class alone 53.1 %`, or nothing."""
    return say("quality.majority", value=found.majority) if found.majority else ""
