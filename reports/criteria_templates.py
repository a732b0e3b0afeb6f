"""Criteria to begin with, by what decides: TOML that explains itself."""

from __future__ import annotations

from typing import Literal

Purpose = Literal["any", "memory", "deadline", "quality", "cost"]


def _criterion(id_: str, metric: str, comparison: str, threshold: str, level: str, why: str) -> str:
    return f"""
[[criterion]]
id = "{id_}"
metric = "{metric}"
engine = "any method"
comparison = "{comparison}"
threshold = {threshold}
level = "{level}"
why = "{why}"
"""


_RUNS = _criterion(
    "runs", "runs_ok", "at least", "1.0", "must",
    "The job has to run to its end, every time, with a finite loss; a run that dies decides against it.",
)  # fmt: skip
_GPU = _criterion(
    "gpu memory", "gpu_memory_share", "at most", "1.0", "must",
    "What is to be trained has to fit into this GPU.",
)  # fmt: skip
_HOST = _criterion(
    "host memory", "host_memory_share", "at most", "0.9", "must",
    "What leaves the GPU lands in the machine's memory, and a tenth of that belongs to everything else.",
)  # fmt: skip
_SPEED = _criterion(
    "speed", "step_time_ratio", "at most", "5.0", "want",
    "Where the job also fits without offloading, a step more than five times as long is hard to justify.",
)  # fmt: skip
_LEARNING = _criterion(
    "learning", "loss_change", "less than", "0.0", "want",
    "The loss has to go down. Make this a must where the job has steps enough to tell.",
)  # fmt: skip
_ROOM = _criterion(
    "room on the gpu", "gpu_memory_share", "at most", "0.9", "must",
    "A tenth of the GPU stays free: a longer batch or another program must not end the job.",
)  # fmt: skip
_DEADLINE = _criterion(
    "deadline", "job_hours", "at most", "12.0", "must",
    "A night: begun in the evening, done in the morning. The size of the job stands in [job].",
)  # fmt: skip
_BETTER = _criterion(
    "better than before", "heldout_change", "less than", "0.0", "must",
    "On data that was not trained on the model has to be better than it was; the job needs an evaluation.",
)  # fmt: skip
_NEAR_NATIVE = _criterion(
    "near native", "heldout_ratio", "at most", "1.02", "want",
    "A method that saves memory may give up 2 % of the held-out loss that native training reaches.",
)  # fmt: skip
_COST = _criterion(
    "cost", "job_cost", "at most", "10000", "must",
    "What the whole job may cost on this machine, in the currency of [prices].",
)  # fmt: skip

_CRITERIA: dict[Purpose, str] = {
    "any": _RUNS + _GPU + _HOST + _SPEED + _LEARNING,
    "memory": _RUNS + _ROOM + _HOST + _LEARNING,
    "deadline": _RUNS + _GPU + _HOST + _DEADLINE + _LEARNING,
    "quality": _RUNS + _GPU + _HOST + _BETTER + _NEAR_NATIVE,
    "cost": _RUNS + _GPU + _HOST + _COST + _DEADLINE.replace('"must"', '"want"') + _LEARNING,
}

_QUESTION = """
# What stands on the first page. Leave empty what is not known.
[question]
purpose = ""      # what the model is to be fine-tuned for
owner = ""        # who decides
decide_by = ""    # such as 2026-12-15
next_gate = ""    # day of the next review
"""

_JOB = """
# How much is trained once it is decided, for hours and cost of the whole job: examples and epochs, or tokens,
# or steps. Change it to yours.
[job]
examples = 10000
epochs = 3
"""

_PRICES = """
# Prices are yours, with the day that they are of: none is built in. These are examples, change every line.
[prices]
currency = "JPY"
as_of = "2026-01-01"
source = "an example, not a quotation"
per_kwh = 30
power_w = 600            # of the whole machine while it trains
# machine = 800000       # what buying it costs; without, it is there anyway
# years = 3
# hours_per_month = 160
# rent_name = "a rented GPU"
# rent_per_hour = 300
# rent_speed = 1.0       # how many times as fast as here
# card_name = "a larger card"
# card = 400000
# card_speed = 1.0
"""


def _commented(text: str) -> str:
    """What may be filled in, as comments."""
    return "".join(
        line if line.startswith("#") or not line.strip() else f"# {line}" for line in text.splitlines(True)
    )


def template(purpose: Purpose) -> str:
    """Question, size of the job, prices and criteria. What `purpose` does not need is there as a comment."""
    return (
        "\nschema_version = 1\n"
        + _QUESTION
        + (_JOB if purpose in ("deadline", "cost") else _commented(_JOB))
        + (_PRICES if purpose == "cost" else _commented(_PRICES))
        + _CRITERIA[purpose]
    )
