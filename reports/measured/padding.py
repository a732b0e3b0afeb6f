"""Steps that were padded further than those of the job will be. Pure."""

from __future__ import annotations

from harness.records.job import make_job
from harness.records.stats import Rounds


def padded_to(rounds: Rounds) -> tuple[int, float] | None:
    """Tokens that every sequence was padded to, and what share of them that was, where `run` pads to the
    longest of a batch; `None`: it would take the same steps."""
    shares = [run.summary.padded_share or 0.0 for run in rounds.ok]
    if not shares or max(shares) == 0:
        return None
    job = make_job(rounds.ok[0].job, "job")
    alike = job.padding == "longest" or job.data.train in ("builtin", "random")
    return None if alike else (job.seq_len, max(shares))
