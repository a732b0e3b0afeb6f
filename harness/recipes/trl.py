"""TRL: a file for `trl sft --config`. Imports no torch.

Keys of SFTConfig (of the Trainer's arguments among them), ModelConfig and DatasetMixtureConfig, looked up in
huggingface/trl f2cd577 (July 2026).
"""

from __future__ import annotations

from typing import Any

from harness.recipes import deepspeed
from harness.recipes.chosen import ChosenMethod, Recipe, as_yaml

FILE = "trl.yaml"
SOURCE = "TRL's SFTConfig and ModelConfig, July 2026"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def trl_recipe(chosen: ChosenMethod) -> Recipe | None:
    """`None`: TRL does not have the method."""
    own = _of_method(chosen)
    if own is None:
        return None
    job = chosen.job
    values: dict[str, Any] = {
        "model_name_or_path": chosen.checkpoint,
        "dtype": _DTYPES[job.dtype],
        **_data(chosen),
        "max_length": job.seq_len,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": chosen.accumulation,
        "gradient_checkpointing": chosen.recomputes,
        **chosen.trainer_arguments,
        "output_dir": "trl-out",
        **own,
    }
    files = {FILE: as_yaml(values, SOURCE, chosen)}
    if "deepspeed" in own:
        files[deepspeed.FILE] = deepspeed.for_trainer(chosen)
    processes = "" if chosen.processes == 1 else f" --num_processes {chosen.processes}"
    return Recipe(files=files, command=f"trl sft --config {FILE}{processes}")


def _data(chosen: ChosenMethod) -> dict[str, Any]:
    if chosen.data is None:
        return {"dataset_name": "YOUR_DATA"}
    if chosen.file_kind is None:
        return {"dataset_name": chosen.data}
    return {"datasets": [{"path": chosen.file_kind, "data_files": chosen.data}]}


def _of_method(chosen: ChosenMethod) -> dict[str, Any] | None:
    settings = chosen.settings
    match chosen.method:
        case "full":
            return {"optim": "adamw_torch_fused"}
        case "cpu_adamw" | "streamed_cpu_adamw":
            return {"deepspeed": deepspeed.FILE}
        case "adamw_8bit":
            return {"optim": "paged_adamw_8bit" if settings.paged else "adamw_bnb_8bit"}
        case "projected_gradients":
            galore = (
                f"rank={settings.rank}, update_proj_gap={settings.update_proj_gap}, scale={settings.scale}"
            )
            return {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": galore}
        case "adapters" | "quantized_adapters":
            own = adapters(settings)
            return own | (
                {"load_in_4bit": True, "use_bnb_nested_quant": settings.double_quant}
                if chosen.method == "quantized_adapters"
                else {}
            )
        case _:
            return None


def adapters(settings: Any) -> dict[str, Any]:
    targets = "all-linear" if settings.targets == ("all",) else list(settings.targets)
    return {
        "use_peft": True,
        "lora_r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.lora_dropout,
        "lora_target_modules": targets,
    }
