"""DeepSpeed's own JSON, by itself or beside the configuration of another program. Imports no torch.

Keys as in docs/_pages/config-json.md of deepspeedai/DeepSpeed.
"""

from __future__ import annotations

import json
from typing import Any

from harness.recipes.chosen import ChosenMethod, Recipe

FILE = "deepspeed.json"
OF_DEEPSPEED = ("full", "cpu_adamw", "streamed_cpu_adamw")


def deepspeed_recipe(chosen: ChosenMethod) -> Recipe | None:
    """`None`: DeepSpeed does not have the method."""
    if chosen.method not in OF_DEEPSPEED:
        return None
    workload = chosen.job.workload
    values = zero(chosen) | {
        "train_micro_batch_size_per_gpu": workload.batch_size,
        "gradient_accumulation_steps": chosen.accumulation,
        "optimizer": {"type": "AdamW", "params": _adam(chosen.settings)},
    }
    if chosen.settings.max_grad_norm:
        values["gradient_clipping"] = chosen.settings.max_grad_norm
    gpus = "" if chosen.processes == 1 else f"--num_gpus {chosen.job.limits.gpus} "
    return Recipe(files={FILE: as_json(values)}, command=f"deepspeed {gpus}YOUR_SCRIPT.py --deepspeed {FILE}")


def zero(chosen: ChosenMethod) -> dict[str, Any]:
    """Where weights and optimizer are, and the precision."""
    cpu = {"device": "cpu", "pin_memory": True}
    stage: dict[str, Any] = {"stage": 0}
    if chosen.streams_weights:
        stage = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    elif chosen.method != "full":
        stage = {"stage": 2, "offload_optimizer": cpu}
    return {"zero_optimization": stage, "bf16": {"enabled": chosen.job.dtype == "bf16"}}


def for_trainer(chosen: ChosenMethod) -> str:
    """For the Trainer of transformers, which fills in the rest."""
    auto = dict.fromkeys(
        (
            "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
            "gradient_clipping",
        ),
        "auto",
    )  # fmt: skip
    adam = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    return as_json(zero(chosen) | {"optimizer": adam} | auto)


def as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _adam(settings: Any) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": [settings.beta1, settings.beta2],
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }
