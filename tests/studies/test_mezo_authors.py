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


@pytest.fixture
def anew(asked: argparse.Namespace, tmp_path: Path) -> argparse.Namespace:
    """The same, with an empty folder for its curves."""
    return argparse.Namespace(**{**vars(asked), "out": tmp_path})


def test_with_the_same_noise_the_losses_differ_by_rounding(anew: argparse.Namespace) -> None:
    engine, loop = (study.train(kind, 3, anew) for kind in ("engine", "same-noise"))
    assert [each.step for each in engine.evaluations] == [0, 10, 20]
    assert abs(engine.evaluations[0].loss - engine.evaluations[-1].loss) > 1e-3
    assert study.difference(engine, loop)[0] < 1e-4
    assert max(abs(a - b) for a, b in zip(engine.losses, loop.losses, strict=True)) < 1e-4
    other = study.train("same-noise", 4, anew)
    assert study.difference(engine, other)[0] > 1e-3


STEPS_OF_THEIRS = """
class Trainer:
    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        torch.manual_seed(random_seed)
        for weight in self.trained:
            weight.data = weight.data + scaling_factor * self.args.zo_eps * torch.normal(
                mean=0, std=1, size=weight.data.size(), dtype=weight.data.dtype
            )

    def zo_forward(self, model, inputs):
        with torch.inference_mode(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach()

    def zo_step(self, model, inputs):
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.seed = np.random.randint(1000000000)
        losses = []
        for scale in (1, -2):
            self.zo_perturb_parameters(self.seed, scale)
            losses.append(self.zo_forward(model, inputs))
        self.slope = ((losses[0] - losses[1]) / (2 * self.args.zo_eps)).item()
        self.zo_perturb_parameters(self.seed, 1)
        return losses[0]

    def zo_update(self, model):
        scale = -self._get_learning_rate() * self.slope / self.args.zo_eps
        self.zo_perturb_parameters(self.seed, scale)
"""
LOSS_OF_THEIRS = """
def forward_wrap_with_option_len(self, input_ids=None, attention_mask=None, labels=None, **options):
    logits = self.original_forward(input_ids=input_ids, attention_mask=attention_mask).logits
    logs = torch.log_softmax(logits[:, -2], dim=-1).gather(1, input_ids[:, -1:]).view(-1, 2)
    return CausalLMOutputWithPast(loss=F.cross_entropy(logs, labels.view(-1, 2)[:, 0]))
"""


@pytest.mark.parametrize(
    ("kind", "ended"),
    [
        ("loop", "before its weights"),
        *((kind, "after its weights") for kind in ("engine", "same-noise", "authors")),
    ],
)
def test_a_run_that_was_ended_goes_on_to_the_same_bits(
    kind: str, ended: str, anew: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it ended between an evaluation and the weights of it, which is taken again then."""
    anew.authors = str(tmp_path)
    (tmp_path / "trainer.py").write_text(STEPS_OF_THEIRS)
    (tmp_path / "utils.py").write_text(LOSS_OF_THEIRS)
    anew.out = tmp_path / "whole"
    anew.out.mkdir()
    whole = study.train(kind, 3, anew)
    assert [path.name for path in anew.out.iterdir()] == [f"{kind}-3.json"]

    anew.out = tmp_path / "ended"
    anew.kinds, anew.seeds, anew.resume = kind, "3", False
    rename = study.os.rename

    def end(old: Path, new: Path) -> None:
        second = new.name.endswith("at-10")
        if not second or ended == "after its weights":
            rename(old, new)
        if second:
            raise KeyboardInterrupt

    monkeypatch.setattr(study.os, "rename", end)
    with pytest.raises(KeyboardInterrupt):
        study.run_all(anew)
    monkeypatch.undo()
    (kept,) = study.read_curves(anew.out)
    assert kept.evaluations == whole.evaluations[:2]
    assert kept.losses == whole.losses[:10]

    with pytest.raises(study.UserError, match="it has not its 20 steps"):
        study.run_all(anew)
    anew.resume = True
    anew.eps = 1e-2
    with pytest.raises(study.UserError, match="begun with another eps"):
        study.run_all(anew)
    anew.eps = 1e-3
    study.run_all(anew)
    (again,) = study.read_curves(anew.out)
    assert (again.evaluations, again.losses) == (whole.evaluations, whole.losses)
    assert [path.name for path in anew.out.iterdir()] == [f"{kind}-3.json"]


def test_a_way_that_is_not_there_is_refused(anew: argparse.Namespace) -> None:
    anew.seeds = "3"
    for kinds, why in (("engine,noise", "there is no 'noise'"), ("authors", "needs the authors' files")):
        anew.kinds = kinds
        with pytest.raises(study.UserError, match=why):
            study.run_all(anew)
    assert list(anew.out.iterdir()) == []


def test_a_curve_without_its_weights_is_not_written_over(anew: argparse.Namespace) -> None:
    anew.kinds, anew.seeds, anew.resume = "same-noise", "3", True
    curve = study.train("same-noise", 3, anew)
    anew.steps = 30
    with pytest.raises(study.UserError, match="no weights beside it"):
        study.run_all(anew)
    assert study.read_curves(anew.out) == [curve]


@pytest.mark.slow
def test_with_the_authors_noise_the_means_over_seeds_are_the_same(anew: argparse.Namespace) -> None:
    seeds = range(4)
    engines = [study.train("engine", seed, anew).evaluations[-1].loss for seed in seeds]
    loops = [study.train("loop", seed, anew).evaluations[-1].loss for seed in seeds]
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
    assert "engine and same-noise, seed 0: losses differ by 0.01 at most, to step 10" in lines
    assert "step 10: 1.00 standard errors apart" in lines
    assert lines[0] == "| step | engine (2 seeds) | loop (2 seeds) | same-noise (1 seeds) |"


def test_the_page_has_the_published_curves() -> None:
    folder = Path(__file__).parent / "smollm2"
    page = (folder / "README.md").read_text(encoding="utf-8")
    curves = study.read_curves(folder / "mezo_authors")
    by_name = {(each.kind, each.seed): each for each in curves}
    most, last = study.difference(by_name["engine", 0], by_name["same-noise", 0])
    assert f"loss to {most:.1e}".replace("e-0", "e-") in page
    assert (len(by_name), last) == (13, 200)
    cpu = study.read_curves(folder / "mezo_authors_cpu")
    assert f"({study.difference(*cpu)[0]:.1e} apart".replace("e-0", "e-") in page
    lines = list(study.table([each for each in curves if each.kind != "same-noise"]))
    for line in lines[: lines.index("")]:
        assert line in page
