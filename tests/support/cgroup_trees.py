"""Control group trees of version 2, laid out as the kernel shows them."""

from __future__ import annotations

from pathlib import Path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def version_2(root: Path, own: str = "/app", mount_root: str = "/", **files: str) -> None:
    """Files are named as `group__file`, with `top` for the mount point."""
    write(
        root,
        {
            "proc/self/cgroup": f"0::{own}",
            "proc/self/mountinfo": f"30 24 0:26 {mount_root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw",
        },
    )
    for key, text in files.items():
        group, _, name = key.partition("__")
        folder = {"top": "", "app": "app/", "job": "app/job/"}[group]
        write(root, {f"sys/fs/cgroup/{folder}{name.replace('_', '.')}": text})
