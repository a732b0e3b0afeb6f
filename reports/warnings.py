"""What a reader has to know before trusting a verdict, a sentence each. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engines import ENGINES, YARDSTICK, engines_of_role, entry
from engines.settings.zeroth_order import approximation
from harness.records.comparison import not_at_its_best, other_host
from harness.records.manifest import FindingKind, ManifestFinding
from harness.records.memory_limits import gpu_taken_bytes, imposed_card_bytes
from harness.records.run import Run
from harness.records.stats import DISTURBED_FACTOR, differing_field, disturbed, faster_or_slower
from harness.runs.emulate import what_is_short
from profiles.language import enumerated, translated
from profiles.machine import Machine
from profiles.units import format_bytes, format_seconds
from reports.criteria import Criteria, default_criteria
from reports.findings import exactness
from reports.format import loss, middle, percent, span
from reports.judging.quality import learned
from reports.judging.ranking import best_quality
from reports.measured.measurements import Measurements, ends, is_emulated, largest, predicted
from reports.measured.padding import padded_to
from reports.messages import say, several_items

FEW_RUNS = 5
"""Below this many runs per method, ranges are shown and called indicative."""


def warnings(
    runs: Sequence[Run], criteria: Criteria | None, all_: Measurements, method: str | None = None
) -> tuple[str, ...]:
    """The warnings that apply, the weightiest first. `all_` holds `runs` by their methods; `method` is the
    verdict's, `None` where it has none."""
    texts = (
        _about_criteria(runs, criteria),
        _about_offload(criteria),
        _about_failures(all_),
        _about_seen(runs),
        _about_worse(all_),
        _about_guessing(all_),
        _about_padding(all_),
        _about_surroundings(runs),
        _if_any(runs, lambda run: _is_ok(run) and not _had_gpu(run), "no_gpu"),
        _about_native(runs, method),
        _about_native_at_best(all_),
        _about_references(all_),
        _about_quality(all_),
        _about_memory_saved(all_),
        _about_the_card(runs),
        _about_disturbed(all_),
        _about_held_clocks(runs),
        _about_predictions(all_),
        _about_traces(runs),
        _about_machine(runs, all_.machine),
        _about_host(runs, all_.machine),
        exactness.inexact(all_),
        _about_approximations(runs),
        _about_notes(runs),
        _about_emulation(runs),
        _about_commit(runs),
        _if_any(runs, lambda run: "wsl" in run.environment.platform.lower(), "wsl"),
        _if_any(runs, lambda run: run.model.random_weights, "random_weights"),
        _about_replication(all_),
    )
    return tuple(text for text in texts if text is not None)


def _is_ok(run: Run) -> bool:
    return run.end_state == "ok"


def _had_gpu(run: Run) -> bool:
    return run.environment.gpu_name is not None


def _if_any(runs: Sequence[Run], holds: Callable[[Run], bool], key: str) -> str | None:
    return say(f"warning.{key}") if any(holds(run) for run in runs) else None


def _about_native(runs: Sequence[Run], method: str | None) -> str | None:
    """What offloading is for, where the answer offloads and native fits."""
    if method is not None and entry(method).role != "offload":
        return None
    return _if_any(runs, lambda run: run.engine == YARDSTICK and _is_ok(run) and _had_gpu(run), "native_fits")


def _about_criteria(runs: Sequence[Run], criteria: Criteria | None) -> str | None:
    if criteria is None:
        return say("warning.no_criteria")
    if not criteria.written_down:
        return say("warning.default_criteria")
    stamps = [run.criteria.sha256 if run.criteria is not None else None for run in runs]
    other = sum(stamp is not None and stamp != criteria.sha256 for stamp in stamps)
    missing = stamps.count(None)
    if other:
        return say("warning.criteria_after_measurement", count=other, total=len(stamps))
    if missing:
        return say("warning.no_criteria_stamped", count=missing, total=len(stamps))
    if _thresholds(criteria) == _thresholds(default_criteria()):
        return say("warning.chosen_by_nobody")
    return None


def _thresholds(criteria: Criteria) -> set[tuple[object, ...]]:
    """What is asked, whatever file it stands in."""
    return {(one.metric, one.comparison, one.threshold, one.level) for one in criteria.criteria}


def _about_offload(criteria: Criteria | None) -> str | None:
    asks = criteria is not None and criteria.spoke_of_offload
    return say("warning.read_as_any") if asks else None


def _about_failures(all_: Measurements) -> str | None:
    mixed = [
        say("warning.item", engine=engine, value=ends(rounds.runs))
        for engine, rounds in sorted(all_.rounds.items())
        if rounds.ok and len(rounds.ok) < len(rounds.runs)
    ]
    return say("warning.some_failed", items=several_items(mixed)) if mixed else None


def _about_native_at_best(all_: Measurements) -> str | None:
    """Native could have been faster, so that being faster than it would say little."""
    reasons = [why for run in all_.of(YARDSTICK).ok if (why := not_at_its_best(run)) is not None]
    return say("warning.native_not_at_best", reason=translated(reasons[0])) if reasons else None


def _about_references(all_: Measurements) -> str | None:
    """A method's reference engine was there and faster, on a GPU whose speed is its own."""
    found = [
        say(
            "warning.reference_fits",
            engine=engine,
            reference=row.reference,
            reference_step=middle(reference.step_s, format_seconds),
            step=middle(offloaded.step_s, format_seconds),
        )
        for engine, row in ENGINES.items()
        if row.reference is not None
        for reference, offloaded in ((all_.of(row.reference), all_.of(engine)),)
        if reference.step_s is not None and offloaded.step_s is not None
        if not is_emulated(reference) and not is_emulated(offloaded)
        if reference.ok[0].environment.gpu_name is not None
        if faster_or_slower(reference, offloaded) == "FAST"
    ]
    return " ".join(found) or None


def _about_quality(all_: Measurements) -> str | None:
    """Held-out losses that too few steps moved, for methods to be told apart by them."""
    if len(all_.rounds) < 2 or (best := best_quality(all_.rounds, all_)) is None or best.told:
        return None
    return say("warning.too_short_to_tell", before=loss(best.before), after=loss(best.after))


def _about_seen(runs: Sequence[Run]) -> str | None:
    """Held-out data that is in the training data as well."""
    seen = max((run.summary.eval_in_training or 0 for run in runs), default=0)
    return say("warning.seen", count=f"{seen:,}") if seen else None


def _about_worse(all_: Measurements) -> str | None:
    """Accuracy that training lowered, whatever became of the loss."""
    found = {engine: learned(engine, all_) for engine in all_.engines}
    fell = [
        say("warning.item", engine=engine, value=say("table.first_to_last", first=one.before, last=one.after))
        for engine, one in found.items()
        if one is not None and one.fell
    ]
    return say("warning.worse", items=several_items(fell)) if fell else None


def _about_guessing(all_: Measurements) -> str | None:
    """Accuracy that another draw of examples could have brought down to that of one and the same answer."""
    found = {engine: learned(engine, all_) for engine in all_.engines}
    guessing = {engine: one for engine, one in found.items() if one is not None and one.is_guessing}
    if not guessing:
        return None
    items = several_items(say("warning.item", engine=each, value=one.told) for each, one in guessing.items())
    return say("warning.guessing", majority=next(iter(guessing.values())).majority, items=items)


def _about_padding(all_: Measurements) -> str | None:
    """Steps that took longer than those of the job will."""
    found = next((padded for rounds in all_.rounds.values() if (padded := padded_to(rounds))), None)
    return None if found is None else say("warning.padded", tokens=found[0], share=percent(found[1]))


def _about_memory_saved(all_: Measurements) -> str | None:
    native = largest(all_.of(YARDSTICK), gpu_taken_bytes)
    items = [
        say("warning.item", engine=engine, value=format_bytes(taken))
        for engine in (*engines_of_role("offload"), *engines_of_role("baseline"))
        if entry(engine).copies != "none"
        and native is not None
        and (taken := largest(all_.of(engine), gpu_taken_bytes)) is not None
        and taken >= native
    ]
    return (
        say("warning.no_memory_saved", native=format_bytes(native), items=enumerated(items))
        if items
        else None
    )


def _about_the_card(runs: Sequence[Run]) -> str | None:
    """The whole GPU's memory in use beside the size of the card that the runs were to do with."""
    beyond: dict[str, int] = {}
    cards: set[int] = set()
    for run in runs:
        card, used = imposed_card_bytes(run), run.summary.peak_gpu_nvml_bytes
        if run.end_state == "ok" and card is not None and used is not None and used > card:
            beyond[run.engine] = max(used, beyond.get(run.engine, 0))
            cards.add(card)
    if not beyond:
        return None
    items = [
        say("warning.item", engine=engine, value=format_bytes(used))
        for engine, used in sorted(beyond.items())
    ]
    return say("warning.beyond_card", card=format_bytes(min(cards)), items=enumerated(items))


def _about_disturbed(all_: Measurements) -> str | None:
    items = [
        say(
            "warning.item",
            engine=engine,
            value=span(format_seconds(rounds.step_s.low), format_seconds(rounds.step_s.high)),
        )
        for engine, rounds in sorted(all_.rounds.items())
        if rounds.step_s is not None and disturbed(rounds)
    ]
    if not items:
        return None
    return say("warning.disturbed", factor=DISTURBED_FACTOR, items=enumerated(items))


def _about_held_clocks(runs: Sequence[Run]) -> str | None:
    held = [run for run in runs if run.disturbance is not None]
    items = dict.fromkeys(
        say("warning.of_method", engine=run.engine, value=translated(run.disturbance or "")) for run in held
    )
    if not items:
        return None
    return say("warning.held", count=len(held), total=len(runs), items=several_items(items))


def _about_predictions(all_: Measurements) -> str | None:
    """Median steps outside the range predicted, which on an emulated machine is for the emulated GPU."""
    items = []
    for engine, rounds in sorted(all_.rounds.items()):
        expected, step_s = predicted(rounds), rounds.step_s
        if expected is None or step_s is None or is_emulated(rounds):
            continue
        low, high = expected.step_s_low, expected.step_s_high
        if low is not None and high is not None and not low <= step_s.median <= high:
            range_ = span(format_seconds(low), format_seconds(high))
            measured = middle(step_s, format_seconds)
            items.append(say("warning.mispredicted_item", engine=engine, measured=measured, range=range_))
    return say("warning.mispredicted", items=several_items(items)) if items else None


def _about_machine(runs: Sequence[Run], machine: Machine | None) -> str | None:
    """A profile from elsewhere: what it says and what was predicted from it is not of where the runs ran."""
    if machine is None:
        return None
    gpu = machine.gpu.name if machine.gpu is not None else ""
    for run in runs:
        # NVML and torch name one GPU alike, but torch may add its slice.
        here = run.environment.gpu_name or ""
        same_gpu = bool(gpu) == bool(here) and (gpu.startswith(here) or here.startswith(gpu))
        if run.environment.emulated == machine.name:
            continue
        if run.end_state == "ok" and not (same_gpu and machine.cpu.name == run.environment.cpu):
            return say("warning.other_machine", machine=machine.name)
        if run.end_state == "ok" and machine.cpu.cores_usable != run.environment.cores_usable:
            return say(
                "warning.other_cores", probed=machine.cpu.cores_usable, ran=run.environment.cores_usable
            )
    return None


def _about_host(runs: Sequence[Run], machine: Machine | None) -> str | None:
    """A machine of the profile's name whose processor is slower than it says, or quicker."""
    found = other_host(runs, machine)
    if found is None:
        return None
    key = "warning.slower_host" if found.is_slower else "warning.quicker_host"
    return say(key, taken=format_seconds(found.taken_s), profile=format_seconds(found.profile_s))


def _about_traces(runs: Sequence[Run]) -> str | None:
    traced = sum(run.traced for run in runs)
    return say("warning.traced", count=traced, total=len(runs)) if traced else None


def _about_approximations(runs: Sequence[Run]) -> str | None:
    items = {
        say("warning.of_method", engine=run.engine, value=translated(what))
        for run in runs
        if (what := approximation(run.plan.settings)) is not None
    }
    return say("warning.approximate", items=several_items(sorted(items))) if items else None


def _about_notes(runs: Sequence[Run]) -> str | None:
    items = dict.fromkeys(
        say("warning.of_method", engine=run.engine, value=note) for run in runs for note in run.notes or ()
    )
    return say("warning.notes", items=several_items(items)) if items else None


def _about_surroundings(runs: Sequence[Run]) -> str | None:
    items = dict.fromkeys(translated(note) for run in runs for note in run.environment.notes or ())
    return say("warning.surroundings", items=several_items(items)) if items else None


def _about_emulation(runs: Sequence[Run]) -> str | None:
    names = sorted({run.environment.emulated for run in runs if run.environment.emulated is not None})
    if not names:
        return None
    text = say("warning.emulated", names=enumerated(names))
    short = dict.fromkeys(
        say("warning.of_method", engine=run.engine, value=line)
        for run in runs
        if run.emulation is not None
        for line in what_is_short(run.emulation)
    )
    return f"{text} {say('warning.not_held', items=several_items(short))}" if short else text


def _about_commit(runs: Sequence[Run]) -> str | None:
    commits = {run.environment.commit for run in runs}
    if len(commits) > 1:
        return say("warning.several_commits", count=len(commits))
    if any(run.environment.dirty for run in runs):
        return say("warning.dirty")
    if runs and commits == {None}:
        return say("warning.commit_unknown")
    return None


def _about_replication(all_: Measurements) -> str | None:
    counts = [len(rounds.ok) for rounds in all_.rounds.values() if rounds.ok]
    if not counts or min(counts) >= FEW_RUNS:
        return None
    return say("warning.few_runs", count=min(counts), enough=FEW_RUNS)


KINDS: tuple[FindingKind, ...] = ("missing", "changed", "added", "not_run", "no_manifest")
"""The weightiest first."""
MOST_NAMED = 4


def about_integrity(findings: Sequence[ManifestFinding], runs: Sequence[Run]) -> tuple[str, ...]:
    """A sentence for each kind of thing that does not hold together."""
    differing = [
        f"{run.id} ({field})"
        for run in runs
        if (field := differing_field(run.summary, run.samples, run.tokens_per_step)) is not None
    ]
    texts = [say("integrity.summary", items=_items(differing))] if differing else []
    for kind in KINDS:
        files = [one.file for one in findings if one.kind == kind]
        if files:
            texts.append(say(f"integrity.{kind}", count=len(files), items=_items(files)))
    return tuple(texts)


def _items(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMED
    named = enumerated(names[:MOST_NAMED])
    return say("integrity.and_more", items=named, count=rest) if rest > 0 else named
