"""SIGINT, SIGTERM and SIGHUP alike: the first lets a command save what it has, a second ends it at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.signals import ENDING, INTERRUPTED, interrupt, named_signal, on_first_signal

ROOT = Path(__file__).parents[2]
WORK = """
import sys, time
from harness.cli import app

def work():
    try:
        print("working", flush=True)
        while True:
            time.sleep(0.01)
    finally:
        if "slowly" in sys.argv:
            print("saving", flush=True)
            time.sleep(30)
        sys.stderr.write("saved\\n")

app.app = lambda **_: work()
app.main()
"""


def start(*arguments: str, ignoring: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORK, *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignoring else None,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


@pytest.mark.parametrize("number", ENDING)
def test_the_first_signal_lets_work_be_saved(number: signal.Signals) -> None:
    process = start()
    wait_for(process, "working")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (INTERRUPTED, "saved\n")


def test_a_second_signal_ends_at_once() -> None:
    process = start("slowly")
    wait_for(process, "working")
    process.send_signal(signal.SIGTERM)
    wait_for(process, "saving")
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (INTERRUPTED, "")


def test_a_lost_connection_takes_nobody_to_tell_along() -> None:
    """Standard error that nobody reads any more is no error of its own."""
    process = start()
    wait_for(process, "working")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == INTERRUPTED
    assert process.stdout is not None
    process.stdout.close()


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    process = start(ignoring=True)
    wait_for(process, "working")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED


def test_outside_the_main_thread_nothing_is_changed() -> None:
    seen = []

    def work() -> None:
        with on_first_signal(interrupt):
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_without_a_name_is_its_number() -> None:
    assert named_signal(7) == "signal 7 (SIGBUS)"
    assert named_signal(40) == "signal 40"
