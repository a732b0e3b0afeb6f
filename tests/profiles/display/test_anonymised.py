"""A page for strangers tells the figures, and nothing of whose machine it is."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tiny_machine import figure, make_machine

from profiles.display.anonymised import REMOVED, machine_page, own_names, scrub
from profiles.machine import Disk, absent

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"


def test_a_page() -> None:
    machine = replace(
        make_machine(),
        name="Fake | GPU of trainer01",
        disk=Disk(
            folder="/home/alice/models", file_system="ext4", total_bytes=2**40, free_bytes=2**39,
            write_bytes_per_s=figure(2e9), read_bytes_per_s=absent(f"OSError: /home/alice/x on {UUID}"),
        ),
    )  # fmt: skip
    page = machine_page(machine, private={"alice", "trainer01"})
    for secret in ("alice", "trainer01", UUID, "/home"):
        assert secret not in page
    assert f"# Fake \\| GPU of {REMOVED}" in page
    assert (
        "| host to GPU, pinned | 13.0 GB/s | 11.7 to 14.3 GB/s | measured, 5 samples: five copies |" in page
    )
    assert "| disk, writing | 2.00 GB/s |" in page
    assert "| disk, reading | not measured |" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_identifiers_go_and_rates_stay() -> None:
    text = f"{UUID} at 00000000:17:00.0, 55.4 GB/s, bytes / bandwidth, 4/3 of 2 in ~/x and /dev/nvme0n1"
    assert scrub(text, ()) == (
        f"{REMOVED} at {REMOVED}, 55.4 GB/s, bytes / bandwidth, 4/3 of 2 in {REMOVED} and {REMOVED}"
    )
    assert scrub("MIG-01234567-89ab", ()) == REMOVED


@given(st.text(alphabet="abcxyz019-.", min_size=3, max_size=20))
def test_a_private_word_never_stays(word: str) -> None:
    assert word.lower() not in scrub(f"on {word.upper()} and {word}, {word}:", {word}).lower().split()


def test_own_names_are_the_hosts_and_the_users() -> None:
    import platform

    host = platform.node()
    assert len(host) <= 2 or host == "localhost" or host in own_names()
    assert "root" not in own_names()
