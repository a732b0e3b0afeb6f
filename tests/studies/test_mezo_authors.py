"""Our `mezo` and the loop of MeZO's authors, as the study has it, are the same training."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
import mezo_authors as study

VOCABULARY = ("<unk>", "<pad>", "It", "was", "terrible", "great", "film", "so", "very", "long")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=1,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    rows = [f"film {'so ' * (i % 5)}{'very ' * (i % 3)}long\t{int(i % 5 > 2)}\n" for i in range(40)]
    (folder / "train.tsv").write_text("".join(rows))
    (folder / "dev.tsv").write_text("".join(rows[:10]))
    return argparse.Namespace(
        model=str(folder), train=str(folder / "train.tsv"), dev=str(folder / "dev.tsv"), rows=30,
        batch_size=4, seq_len=16, steps=20, every=10, learning_rate=1e-3, eps=1e-3, device="cpu",
        authors=None,
    )  # fmt: skip


def test_with_the_same_noise_the_losses_differ_by_rounding(asked: argparse.Namespace) -> None:
    engine, loop = (study.train(kind, 3, asked) for kind in ("engine", "same-noise"))
    assert [each.step for each in engine.evaluations] == [0, 10, 20]
    assert abs(engine.evaluations[0].loss - engine.evaluations[-1].loss) > 1e-3
    assert study.difference(engine, loop) < 1e-4
    assert max(abs(a - b) for a, b in zip(engine.losses, loop.losses, strict=True)) < 1e-4
    other = study.train("same-noise", 4, asked)
    assert study.difference(engine, other) > 1e-3


@pytest.mark.slow
def test_with_the_authors_noise_the_means_over_seeds_are_the_same(asked: argparse.Namespace) -> None:
    seeds = range(4)
    engines = [study.train("engine", seed, asked).evaluations[-1].loss for seed in seeds]
    loops = [study.train("loop", seed, asked).evaluations[-1].loss for seed in seeds]
    assert study.standard_errors_apart(engines, loops) < 3
    assert study.standard_errors_apart(engines, [each + 0.1 for each in loops]) > 3


def test_the_table_says_what_is_the_same_and_how_far_means_are_apart() -> None:
    evaluations = tuple(study.Evaluated(step=step, loss=1.0 - step / 100, accuracy=0.5) for step in (0, 10))
    one = study.Curve(
        kind="engine", seed=0, learning_rate=1e-5, eps=1e-3, evaluations=evaluations, losses=(1.0,),
        train_s=1.0, device="cpu", model="tiny",
    )  # fmt: skip
    near = replace(evaluations[1], loss=0.91)
    curves = [
        one,
        replace(one, seed=1, evaluations=(evaluations[0], near)),
        replace(one, kind="same-noise", evaluations=(evaluations[0], near)),
        replace(one, kind="loop"),
        replace(one, kind="loop", seed=1),
    ]
    lines = list(study.table(curves))
    assert "engine and same-noise, seed 0: losses differ by 0.01 at most" in lines
    assert "step 10: 1.00 standard errors apart" in lines
    assert lines[0] == "| step | engine (2 seeds) | loop (2 seeds) | same-noise (1 seeds) |"
