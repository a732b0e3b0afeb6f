"""T* from seconds by tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from crossover import RESULTS, ROOT, Timed, crossover, main, of_records, predicted_of

from engines.errors import UserError

DAY = "h200_20261130"
RECORDS = {
    "6.7b": tuple(f"{tokens}-tokens-exact-offload" for tokens in ("384", "4k", "16k", "32k")),
    "1.3b": tuple(f"{tokens}-tokens-exact-offload-three" for tokens in ("4k", "16k", "32k")),
}
"""Of one sitting each, the shortest steps first; those of 1.3B have their blocks as CUDA graphs."""


def timed(tokens: int, cpu_s: float = 0.32, gpu_s_per_token: float = 20e-6) -> Timed:
    """The CPU takes as long for any number of tokens, and a hundredth more waits for its first block."""
    gpu_s = gpu_s_per_token * tokens
    return Timed(step_s=1.01 * max(cpu_s, gpu_s), gpu_s=gpu_s, cpu_s=cpu_s)


def test_where_two_lines_cross() -> None:
    found = {tokens: timed(tokens) for tokens in (1_000, 4_000, 16_000, 32_000)}
    assert crossover(found) == pytest.approx(16_000)


def test_what_does_not_grow_is_not_the_cpus_where_it_is_idle() -> None:
    for cpu_s in (0.01, None):
        found = {1_000: Timed(step_s=0.32, gpu_s=0.02, cpu_s=cpu_s), 32_000: timed(32_000)}
        assert crossover(found) is None


@pytest.mark.parametrize("lengths", [(1_000, 4_000, 8_000), (17_000, 24_000, 32_000), (1_000,)])
def test_it_is_not_found_on_one_side_alone(lengths: tuple[int, ...]) -> None:
    assert crossover({tokens: timed(tokens) for tokens in lengths}) is None


def folders_of(model: str) -> list[Path]:
    return [RESULTS / f"deepseek-coder-{model}-{each}_{DAY}" for each in RECORDS[model]]


@pytest.mark.parametrize("model", list(RECORDS))
def test_published_steps_cross_about_where_a_plan_for_their_machine_says(model: str) -> None:
    """Within a tenth; and the longest of them hides its update, the shortest does not."""
    folders = folders_of(model)
    found, longest = of_records(folders, "exact-offload")
    shortest, *_, last = sorted(found)
    assert (len(found), last) == (len(folders), 32768)
    assert longest == folders[-1]
    assert [found[tokens].hides for tokens in (shortest, last)] == [False, True]
    assert crossover(found) == pytest.approx(predicted_of(longest, "exact-offload"), rel=0.1)


@pytest.mark.parametrize("page", ["README.md", "reports/FINDINGS.md"])
def test_the_pages_tell_what_the_records_say(page: str) -> None:
    found, planned = [], []
    for model in RECORDS:
        timed_, longest = of_records(folders_of(model), "exact-offload")
        for each, kept in ((crossover(timed_), found), (predicted_of(longest, "exact-offload"), planned)):
            assert each is not None
            kept.append(f"{each / 1000:.1f}")
    told = "{} thousand tokens a step on (1.3B: {}; predicted {} and {})".format(*found, *planned)
    assert told in " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_the_script_tells_both(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"deepseek-coder-1.3b-{{}}-tokens-exact-offload_{DAY}"
    assert main(["--records", *(str(RESULTS / name.format(each)) for each in ("384", "32k"))]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "384 tokens: 253.0 ms; gpu, cpu: 139.4, 240.9; not hidden"
    assert [line.split(":")[0] for line in told[2:]] == ["T* measured", "T* predicted"]


def test_two_records_with_as_many_tokens_are_refused() -> None:
    folder = RESULTS / f"deepseek-coder-1.3b-384-tokens-exact-offload_{DAY}"
    with pytest.raises(UserError, match="has 384 tokens a step, as another has"):
        of_records([folder, folder], "exact-offload")
    with pytest.raises(UserError, match="has no run of lsp"):
        of_records([folder], "lsp")
