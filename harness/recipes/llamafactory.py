"""LLaMA-Factory: a file for `llamafactory-cli train`, and its list of data sets. Imports no torch.

Keys of src/llamafactory/hparams and data/README.md, looked up in hiyouga/LLaMA-Factory ff6d4d1 (August 2026).
"""

from __future__ import annotations

import json
from typing import Any

from harness.recipes import deepspeed
from harness.recipes.chosen import ChosenMethod, Recipe, as_yaml

FILE = "llamafactory.yaml"
SOURCE = "LLaMA-Factory's hparams, August 2026"
DATA_SET = "mine"


def llamafactory_recipe(chosen: ChosenMethod) -> Recipe | None:
    """`None`: LLaMA-Factory does not have the method."""
    own = _of_method(chosen)
    if own is None:
        return None
    job = chosen.job
    values: dict[str, Any] = {
        "model_name_or_path": chosen.checkpoint,
        "stage": "pt" if chosen.data_kind == "text" else "sft",
        "do_train": True,
        "dataset": DATA_SET,
        "dataset_dir": ".",
        "template": "default",
        "cutoff_len": job.seq_len,
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": chosen.accumulation,
        "disable_gradient_checkpointing": not chosen.recomputes,
        **chosen.trainer_arguments,
        "output_dir": "llamafactory-out",
        **own,
    }
    files = {FILE: as_yaml(values, SOURCE, chosen), "dataset_info.json": _data_sets(chosen)}
    if "deepspeed" in own:
        files[deepspeed.FILE] = deepspeed.for_trainer(chosen)
    return Recipe(files=files, command=f"llamafactory-cli train {FILE}")


def _data_sets(chosen: ChosenMethod) -> str:
    where = "hf_hub_url" if chosen.data is not None and chosen.file_kind is None else "file_name"
    entry: dict[str, Any] = {where: chosen.data or "YOUR_DATA"}
    if chosen.data_kind == "chats":
        tags = {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        }
        entry |= {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    elif chosen.data_kind == "text":
        entry |= {"columns": {"prompt": "text"}}
    return json.dumps({DATA_SET: entry}, indent=1, ensure_ascii=False) + "\n"


def _of_method(chosen: ChosenMethod) -> dict[str, Any] | None:
    settings = chosen.settings
    # With masters in fp32 weights would take twice the memory that was planned.
    whole = {"finetuning_type": "full", "pure_bf16": chosen.job.dtype == "bf16"}
    match chosen.method:
        case "full":
            return whole
        case "cpu_adamw" | "streamed_cpu_adamw":
            return {"finetuning_type": "full", "deepspeed": deepspeed.FILE}
        case "adamw_8bit":
            return whole | {"optim": "paged_adamw_8bit" if settings.paged else "adamw_bnb_8bit"}
        case "projected_gradients":
            return whole | {
                "use_galore": True,
                "galore_rank": settings.rank,
                "galore_update_interval": settings.update_proj_gap,
                "galore_scale": settings.scale,
            }
        case "adapters" | "quantized_adapters":
            own: dict[str, Any] = {
                "finetuning_type": "lora",
                "lora_rank": settings.r,
                "lora_alpha": int(settings.alpha),
                "lora_dropout": settings.lora_dropout,
                "lora_target": ",".join(settings.targets),
            }
            if chosen.method == "quantized_adapters":
                own |= {
                    "quantization_bit": 4,
                    "quantization_method": "bnb",
                    "double_quantization": settings.double_quant,
                }
            return own
        case _:
            return None
