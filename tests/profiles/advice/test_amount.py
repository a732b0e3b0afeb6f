"""How much a job trains: from flags, from data, and what contradicts itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import UserError
from engines.shapes import Workload
from profiles.advice.amount import Amount, Asked, DataLengths, amount_of

WORKLOAD = Workload(batch_size=4, seq_len=512, accumulation=2)
DATA = DataLengths(
    sequences=1000, tokens=200_000, shares=((128, 0.25), (256, 0.75)), description="1,000 examples"
)


def amount(asked: Asked, data: DataLengths | None = None) -> Amount:
    found = amount_of(WORKLOAD, asked, data)
    assert found is not None
    return found


def test_steps_follow_from_examples_and_epochs() -> None:
    found = amount(Asked(examples=1001, epochs=3))
    assert (found.sequences, found.steps) == (3003, 376)
    assert found.tokens == 3003 * 512
    assert "--examples 1,001, 3 epochs" in found.basis


def test_tokens_are_those_of_the_data_without_padding() -> None:
    found = amount(Asked(), DATA)
    assert (found.sequences, found.steps, found.tokens, found.shares) == (1000, 125, 200_000, DATA.shares)
    assert amount(Asked(epochs=2.5), DATA).sequences == 2500
    assert amount(Asked(examples=50_000), DATA).tokens == 10_000_000  # a larger file of such lengths
    assert amount(Asked(tokens=10_000_000), DATA).sequences == 50_000
    assert amount(Asked(steps=10), DATA).sequences == 80


def test_nothing_said_is_nothing_known() -> None:
    assert amount_of(WORKLOAD, Asked(), None) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"examples": 0}, "--examples 0"),
        ({"epochs": -1.0}, "--epochs -1"),
        ({"epochs": float("nan")}, "--epochs nan"),
        ({"steps": 5, "examples": 5}, "--steps and --examples"),
        ({"steps": 5, "epochs": 2}, "--steps and --epochs"),
        ({"tokens": 5, "examples": 5}, "--examples and --tokens"),
    ],
)
def test_what_contradicts_itself_is_the_users_error(values: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Asked(**values)  # type: ignore[arg-type]


def test_epochs_of_nothing_are_the_users_error() -> None:
    with pytest.raises(UserError, match="does not say of how much"):
        amount_of(WORKLOAD, Asked(epochs=3), None)


@given(examples=st.integers(1, 10**9), epochs=st.floats(0.1, 100))
def test_every_sequence_is_in_a_step_and_no_step_is_empty(examples: int, epochs: float) -> None:
    found = amount(Asked(examples=examples, epochs=epochs))
    assert (found.steps - 1) * 8 < max(found.sequences, 1) <= found.steps * 8


@pytest.mark.parametrize("epochs", [1e15, 1e306])
def test_more_than_anybody_trains_is_one_line(epochs: float) -> None:
    with pytest.raises(UserError, match="more than anybody trains"):
        amount(Asked(examples=10_000, epochs=epochs))


def test_one_sequence_is_one() -> None:
    one = DataLengths(sequences=1, tokens=15, shares=((64, 1.0),), description="1 row of a test")
    assert amount(Asked(), one).basis == "1 training sequence; 1 row of a test"
