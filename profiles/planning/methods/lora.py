"""What lets LoRA fit where it does not. No torch."""

from __future__ import annotations

from profiles.planning.context import SettingChange

WAYS_OUT = (SettingChange(values={"r": 4}, quality="adapters of rank 4; what that costs was not studied"),)
