"""The checklist of security and data governance."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import SHAPE, scripted_job, scripted_plan

from harness.contacts import contacted, contacts_watched
from harness.records.governance import Governance, Place
from harness.records.job import DataSource, ModelSource
from harness.records.run import EndState
from harness.runs.governance_facts import governance_facts
from harness.runs.sweep import run_sweep
from reports.findings.governance import TO_TICK, governance_lines
from reports.render import write_report
from run_records import make_run, write_folder

SEEN = Governance(
    places=(
        Place(what="weights", where="user", name="my|model", mode="0755"),
        Place(what="data", where="program"),
    ),
    swap_bytes=2**30,
    core_dumps=False,
    hub="may be asked",
    sent="names of files on the hub",
)


def test_what_was_seen_is_filled_in_and_the_rest_is_to_tick(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sweep", [replace(make_run(), governance=SEEN)])
    write_report(folder)
    markdown, html = ((folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "named: my\\|model (mode 0755: more than its owner may read it)" in markdown
    assert markdown.count("- [x] ") == 6
    assert markdown.count("- [ ] ") == len(TO_TICK) == html.count("&#9744;")
    lines = json.loads((folder / "verdict.json").read_text())["governance"]
    assert [line["seen"] for line in lines] == [True] * 6 + [False] * len(TO_TICK)


def test_where_runs_differ_each_fact_is_told() -> None:
    other = replace(SEEN, swap_bytes=0)
    runs = [replace(make_run(round=i), governance=each) for i, each in enumerate((SEEN, other, SEEN), 1)]
    (swap,) = (line for line in governance_lines(runs) if line.about == "Swap")
    assert swap.text.startswith("on, ")
    assert swap.text.endswith("; none")


@pytest.mark.parametrize(("end", "told"), [("ok", False), ("not_available", False), ("crash", True)])
def test_logs_of_failed_runs_are_told_where_one_failed(end: EndState, told: bool) -> None:
    """A folder of logs was on the list, with its permissions, where nothing had written one."""
    place = Place(what="logs", where="results", name="logs/", mode="0755")
    seen = replace(SEEN, places=(*SEEN.places, place))
    runs = [replace(make_run(round=i), governance=seen, end_state=each) for i, each in enumerate(("ok", end))]
    assert ("Logs of failed runs" in [line.about for line in governance_lines(runs)]) is told


def test_records_of_before_have_no_checklist(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sweep", [make_run()])
    write_report(folder)
    assert "governance" not in (folder / "verdict.json").read_text()
    assert "governance" not in (folder / "report.md").read_text().lower()


@pytest.mark.parametrize(("offline", "hub", "sent"), [
    ("1", "offline", "nothing"), ("", "may be asked", "names of files on the hub"),
])  # fmt: skip
def test_a_model_of_the_hub_may_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str, hub: str, sent: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    tmp_path.chmod(0o750)
    job = replace(
        scripted_job(), model=ModelSource(name="nobody/nothing"), data=DataSource(train=str(tmp_path))
    )
    facts = governance_facts(job, None, tmp_path, "runs/", "logs/")
    assert (facts.hub, facts.sent, facts.contacted) == (hub, sent, None)
    weights, data, records, _ = facts.places
    assert (weights.where, weights.mode) == ("hub", None)
    assert (data.where, data.name, data.mode, records.mode) == ("user", tmp_path.name, "0750", "0750")
    drawn = replace(job, model=ModelSource(name="opt-125m", random_weights=True), data=DataSource())
    assert governance_facts(drawn, None, tmp_path, "runs/", "logs/").hub == "not needed"


def test_what_was_contacted_is_observed_here_and_in_the_child(tmp_path: Path) -> None:
    job = replace(scripted_job(), model=ModelSource(name="nobody/nothing"), data=DataSource())
    where = (job, None, tmp_path, "runs/", "logs/")
    with socket.create_server(("127.0.0.1", 0)) as server, contacts_watched():
        assert governance_facts(*where).contacted == ()
        assert governance_facts(*where).hub in ("not asked", "offline")
        told = governance_facts(*where, ("huggingface.co",))
        assert (told.hub, told.sent, told.contacted) == (
            "asked",
            "names of files on the hub",
            ("huggingface.co",),
        )
        assert governance_facts(*where, None).contacted is None
        socket.create_connection(server.getsockname()).close()
        told = governance_facts(*where, ("huggingface.co",))
        assert told.contacted == ("127.0.0.1", "huggingface.co")
    assert contacted() is None
    (hub,) = (
        line for line in governance_lines([replace(make_run(), governance=told)]) if line.about == "Hub"
    )
    assert hub.text.endswith("127.0.0.1, huggingface.co")


ASKING = """
import socket, sys
from harness.runs import worker

def run(*arguments):
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)  # nobody is there: to ask is enough
    except OSError:
        pass

worker._run = run
sys.exit(worker.main(sys.argv[1:]))
"""


def test_a_child_tells_whom_it_contacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, script = subprocess.Popen, tmp_path / "asking.py"
    script.write_text(ASKING)

    def start(command: list[str], **more: Any) -> Any:
        if "harness.runs.worker" in command:
            command = [sys.executable, str(script), *command[command.index("harness.runs.worker") + 1 :]]
        return popen(command, **more)

    monkeypatch.setattr("harness.runs.processes.subprocess.Popen", start)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (run,) = run_sweep(scripted_job(), SHAPE, [scripted_plan()], tmp_path / "out")
    assert run.governance is not None
    assert run.governance.contacted is None  # the sweep's own process was not watched
    with contacts_watched():
        (run,) = run_sweep(scripted_job(), SHAPE, [scripted_plan()], tmp_path / "watched")
    assert run.governance is not None
    assert (run.governance.contacted, run.governance.hub) == (("127.0.0.1",), "asked")
    monkeypatch.delenv("HF_ENDPOINT")
    assert governance_facts(scripted_job(), None, tmp_path, "", "", ("127.0.0.1",)).hub != "asked"
