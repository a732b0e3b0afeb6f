"""Norms of a step's gradients, and by what they are clipped: their own norm, or that of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.cpu_updates.chunks import UpdateStep
from engines.cpu_updates.rank_updates import RankUpdates
from engines.settings.exact_offload import ExactOffloadSettings
from engines.transfer.link import Event, Link


class GradientNorms:
    """Of groups of tensors, and of all of them together, squared."""

    def __init__(self, groups: int, settings: ExactOffloadSettings, link: Link) -> None:
        device = link.device
        self._settings = settings
        self._link = link
        self.of_groups = torch.zeros(groups, device=device)
        """(groups,) fp32: squared, of this step's gradients.

        HAZARD: a group's must not change before it has been downloaded, which may be as late as when its
        update is waited for.
        """
        pins = device.type == "cuda"
        self._on_host = [torch.zeros(1, pin_memory=pins) for _ in range(2)]
        """Of the whole gradient, of even and of odd steps."""
        self._on_device = [torch.zeros(1, device=device) for _ in range(2)]
        """The same on the GPU, from where they go down.

        HAZARD: one must not change before it has arrived, which is known in the step after.
        """
        self._known = Event()
        self._is_whole = True
        """Of what is known of the step before. With several ranks what they sum up on the host is added to it
        when the CPU has it."""
        self.d2h_bytes = 0
        """Of norms of the whole gradient, so far."""

    def begin(self, step: UpdateStep) -> None:
        """A step begins; where it is clipped by the norm of the one before, `step` gets that."""
        if self._settings.clip_by == "previous" and step.max_norm is not None and step.number > 0:
            step.total = self._on_host[(step.number - 1) % 2]
            step.total_known = self._known

    def learn(self, step: UpdateStep, ranks: RankUpdates) -> None:
        """With several ranks, once the step before has been updated: let `step` have the norm of that, where
        it is clipped by it."""
        if step.total is None or self._is_whole or self._settings.clip_by == "exact":
            return
        self._link.host_wait(self._known)
        step.total += ranks.wait_for_norm(step.number - 1)
        self._is_whole = True

    @torch.no_grad()
    def take(self, group: int, gradient: Tensor) -> Tensor:
        """(1,) on the device: the squared norm of a group's `gradient`, (elements,)."""
        norm = self.of_groups[group : group + 1]
        found = torch.linalg.vector_norm(gradient, dim=0, keepdim=True, dtype=torch.float32)
        return torch.square(found, out=norm)

    def finish(self, step: UpdateStep, squared: Tensor, *, waits: bool) -> Tensor | None:
        """Where gradients are clipped, bring the squared norm of the whole, (1,), to the host, for this step
        or the next; with `waits` this thread waits for it. Returns what this step's gradient is multiplied
        by, (1,) on the device.
        """
        if step.max_norm is None:
            return None
        total, on_host = (each[step.number % 2] for each in (self._on_device, self._on_host))
        total.copy_(squared)
        known = self._link.download(total, on_host, after=self._link.record(), name="norm")
        self.d2h_bytes += squared.nbytes
        scale = None
        if self._settings.clip_by == "exact":
            step.total, step.total_known = on_host, known
            scale = (step.max_norm / squared.sqrt()).clamp(max=1.0)
            if waits:
                self._link.host_wait(known)
        else:
            scale = self.scale_by_previous(step)
        self._known, self._is_whole = known, False
        return scale

    def scale_by_previous(self, step: UpdateStep) -> Tensor | None:
        """What this step's gradient is multiplied by, (1,) on the device, where it is clipped by the norm of
        the step before; `None`: it is not, or there was none."""
        if self._settings.clip_by == "exact" or step.total is None:
            return None
        self._link.host_wait(step.total_known)
        return torch.full((1,), step.scale(), device=self.of_groups.device)

    def last(self, steps_done: int, ranks: RankUpdates | None) -> Tensor:
        """(1,) on the host: of the last step's whole gradient, squared. Waits for it. `ranks`: those
        that there are, if several."""
        self._link.host_wait(self._known)
        found = self._on_host[(steps_done - 1) % 2]
        if ranks is not None and not self._is_whole and self._settings.clip_by == "previous":
            found += ranks.wait_for_norm(steps_done - 1)
            self._is_whole = True
        return found

    def take_back(self, total: Tensor, steps_done: int) -> None:
        """What `last` gave, after so many steps."""
        self._on_host[(steps_done - 1) % 2].copy_(total)
        self._is_whole = True
