"""Tiny models of each family, real weights on the CPU, wrapped as blueprints for engine tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from engines.base import Batch
from engines.model.blocks import find_blocks
from engines.shapes import Head, MatrixShape, ModelShape
from harness.models.auto_classes import auto_class

VOCABULARY = 64
SEQ_LEN = 16


def tiny_config(family: str, tied: bool, num_blocks: int = 3) -> PretrainedConfig:
    """Two heads of eight, three blocks, no dropout."""
    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=16, n_layer=num_blocks, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, **common,
        )  # fmt: skip
    sizes = {"hidden_size": 16, "num_hidden_layers": num_blocks, "num_attention_heads": 2}
    if family == "opt":
        return AutoConfig.for_model(
            "opt", ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
            **sizes, **common,
        )  # fmt: skip
    if family in ("llama", "qwen2"):
        return AutoConfig.for_model(
            family, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, **sizes, **common,
        )  # fmt: skip
    if family == "deberta-v2":  # blocks return pairs, and take embeddings of positions that are trained
        return AutoConfig.for_model(
            family, intermediate_size=32, max_position_embeddings=64, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pooler_dropout=0.0, pad_token_id=0, num_labels=2,
            relative_attention=True, pos_att_type=["c2p", "p2c"], **sizes, **common,
        )  # fmt: skip
    if family in ("roberta", "bert"):
        return AutoConfig.for_model(
            family, intermediate_size=32, max_position_embeddings=66, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=1, num_labels=2, **sizes, **common,
        )  # fmt: skip
    raise ValueError(family)


@dataclass
class TinyBlueprint:
    shape: ModelShape
    model: nn.Module
    reference: nn.Module
    """The same model with its weights on the CPU in fp32."""
    sample: Batch | None = None

    def fill(self, name: str, out: Tensor) -> None:
        out.copy_(self.reference.get_parameter(name))

    def release(self) -> None:
        """The reference stays: tests compare with it."""


def usual_head(family: str) -> Head:
    return "classification" if family in ("roberta", "bert", "deberta-v2") else "causal_lm"


def tiny_blueprint(
    family: str, tied: bool = False, num_blocks: int = 3, seed: int = 0, head: Head | None = None
) -> TinyBlueprint:
    head = head or usual_head(family)
    config = tiny_config(family, tied, num_blocks)
    torch.manual_seed(seed)
    reference = auto_class(head).from_config(config).to(torch.float32)
    buffers = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    model = copy.deepcopy(reference).to("meta")
    if tied and head == "causal_lm":
        model.tie_weights()
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer
    _, blocks = find_blocks(reference)
    block = blocks[0]
    block_parameters = sum(p.numel() for p in block.parameters())
    total = sum(p.numel() for p in reference.parameters())
    shape = ModelShape(
        name=f"tiny-{family}", family=family, head=head,
        num_blocks=num_blocks, hidden=16, intermediate=32, num_heads=2, num_kv_heads=2, vocabulary=VOCABULARY,
        max_seq_len=64, gated_mlp=family in ("llama", "qwen2"), tied=tied,
        num_labels=0 if head == "causal_lm" else 2,
        block_parameters=block_parameters, non_block_parameters=total - num_blocks * block_parameters,
        head_parameters=(VOCABULARY if head == "causal_lm" else 2) * 16,
        matrices=tuple(
            MatrixShape(name=name, rows=p.shape[0], columns=p.shape[1])
            for name, p in block.named_parameters() if p.dim() == 2
        ),
        largest_tensor=max(p.numel() for p in reference.parameters()),
    )  # fmt: skip
    return TinyBlueprint(shape=shape, model=model, reference=reference)


def tiny_batches(
    count: int,
    family: str,
    seed: int = 0,
    batch_size: int = 2,
    seq_len: int = SEQ_LEN,
    head: Head | None = None,
) -> list[Batch]:
    """Random tokens; a third of the positions of a causal batch are unlabelled. Of a batch with questions the
    first row is padded."""
    head = head or usual_head(family)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (batch_size, seq_len), generator=generator)
        if head == "question_answering":
            mask = torch.ones_like(ids)
            mask[0, seq_len - 3 :] = 0
            ends = torch.randint(0, seq_len - 3, (batch_size, 2), generator=generator).sort(1).values
            inputs = {"input_ids": ids, "attention_mask": mask}
            batches.append(
                Batch(inputs={**inputs, "start_positions": ends[:, 0], "end_positions": ends[:, 1]})
            )
            continue
        if head == "classification":
            labels = torch.randint(0, 2, (batch_size,), generator=generator)
        else:
            labels = ids.clone()
            labels[:, : seq_len // 3] = -100
        batches.append(
            Batch(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        )
    return batches
