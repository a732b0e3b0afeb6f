"""axolotl: a file for `axolotl train`. Imports no torch.

Keys of its schemas (src/axolotl/utils/schemas), looked up in axolotl-ai-cloud/axolotl 067b021 (July 2026).
"""

from __future__ import annotations

from typing import Any

from harness.recipes import deepspeed
from harness.recipes.chosen import ChosenMethod, Recipe, as_yaml
from harness.records.job import DataKind

FILE = "axolotl.yaml"
SOURCE = "axolotl's schemas, July 2026"
_TYPES: dict[DataKind, str] = {"instructions": "alpaca", "chats": "chat_template", "text": "completion"}


def axolotl_recipe(chosen: ChosenMethod) -> Recipe | None:
    """`None`: axolotl does not have the method."""
    own = _of_method(chosen)
    if own is None:
        return None
    job = chosen.job
    values: dict[str, Any] = {
        "base_model": chosen.checkpoint,
        "datasets": [_data(chosen)],
        "sequence_len": job.seq_len,
        "sample_packing": False,
        "micro_batch_size": job.batch_size,
        "gradient_accumulation_steps": chosen.accumulation,
        "gradient_checkpointing": chosen.recomputes,
        "learning_rate": chosen.settings.learning_rate,
        "lr_scheduler": chosen.schedule,
        "warmup_steps": chosen.settings.warmup_steps,
        "weight_decay": chosen.settings.weight_decay,
        **chosen.adam,
        "max_grad_norm": chosen.settings.max_grad_norm,  # 0 is no clipping; left out it clips at 1
        **({} if chosen.steps is None else {"max_steps": chosen.steps}),
        "bf16": job.dtype == "bf16",
        "fp16": False,
        "seed": job.seed,
        "output_dir": "axolotl-out",
        **own,
    }
    files = {FILE: as_yaml(values, SOURCE, chosen)}
    if "deepspeed" in own:
        files[deepspeed.FILE] = deepspeed.for_trainer(chosen)
    return Recipe(files=files, command=f"axolotl train {FILE}")


def _data(chosen: ChosenMethod) -> dict[str, Any]:
    found: dict[str, Any] = {"path": chosen.data or "YOUR_DATA"}
    if chosen.file_kind is not None:
        found["ds_type"] = chosen.file_kind
    return found | {"type": _TYPES.get(chosen.data_kind, "alpaca")}


def _of_method(chosen: ChosenMethod) -> dict[str, Any] | None:
    settings = chosen.settings
    match chosen.method:
        case "full":
            return {"optimizer": "adamw_torch_fused"}
        case "cpu_adamw" | "streamed_cpu_adamw":
            return {"optimizer": "adamw_torch", "deepspeed": deepspeed.FILE}
        case "adamw_8bit":
            return {"optimizer": "paged_adamw_8bit" if settings.paged else "adamw_bnb_8bit"}
        case "projected_gradients":
            galore = {
                "rank": settings.rank,
                "update_proj_gap": settings.update_proj_gap,
                "scale": settings.scale,
            }
            return {
                "optimizer": "galore_adamw",
                "optim_target_modules": "all_linear",
                "optim_args": galore,
            }
        case "adapters" | "quantized_adapters":
            return {
                "adapter": "qlora" if chosen.method == "quantized_adapters" else "lora",
                "load_in_4bit": chosen.method == "quantized_adapters",
                "lora_r": settings.r,
                "lora_alpha": int(settings.alpha),
                "lora_dropout": settings.lora_dropout,
                **_targets(settings),
                "optimizer": "adamw_torch_fused",
            }
        case _:
            return None


def _targets(settings: Any) -> dict[str, Any]:
    if settings.targets == ("all",):
        return {"lora_target_linear": True}
    return {"lora_target_modules": list(settings.targets)}
