"""Our `mezo` beside the loop of MeZO's authors: same data, template, batches, learning rate and seeds.

    python tests/studies/mezo_authors.py run OUT --model DIR --train FILE --dev FILE [--device cuda:0]
    python tests/studies/mezo_authors.py table OUT

Four ways to the same steps, in fp32, on SST-2 by the template `{text} It was`:

- `engine`: `engines.methods.mezo`.
- `loop`: the authors' loop as `zo_step` and `zo_update` of their `large_models/trainer.py` have it, written
  again here: perturb by plus, minus two, plus one times eps z, z drawn anew from its seed each time, the loss
  over the likelihoods of the label words, each of which makes a sequence of its own, padded on the left.
- `same-noise`: that loop with z of the engine's own generator, so that nothing differs but rounding.
- `authors`, where `--authors` names a folder with their trainer.py and utils.py: their own functions, taken
  out of these files. Neither is part of this repository.

Every curve is a file in OUT: loss and accuracy on development data by one function for all, on the weights
that each way has come to. Each evaluation is written as it comes, with the weights beside it until the curve
has its last step, so that `--resume` goes on from the last one whatever ended a run. `table` says by how much
`same-noise` and `engine` differ at most, whether `authors` and `loop` have the same numbers, and how far the
means over seeds of `engine` and of those with the authors' noise lie apart, in standard errors.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from engines.base import Batch, Context  # noqa: E402
from engines.errors import UserError  # noqa: E402
from engines.methods.mezo import Mezo  # noqa: E402
from engines.noise.philox import NoiseKey, normal  # noqa: E402
from engines.settings.zeroth_order import MezoSettings  # noqa: E402
from harness.data.batches import Data, batches_of  # noqa: E402
from harness.data.tokenizing import tokenize  # noqa: E402
from harness.models.blueprint import make_blueprint  # noqa: E402
from harness.models.candidates import candidates_of  # noqa: E402
from harness.models.tokenizers import load_tokenizer  # noqa: E402
from harness.records.job import DataSource, Job, ModelSource  # noqa: E402
from harness.resolve import resolve_shape  # noqa: E402

TEMPLATE, WORDS = "{text} It was", ("terrible", "great")
ELSEWHERE = "name another folder"
KINDS = ("engine", "loop", "same-noise", "authors")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    step: int
    loss: float
    """Mean over the development data of the cross-entropy over the two words."""
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training by one of the ways."""

    kind: str
    seed: int
    learning_rate: float
    eps: float
    evaluations: tuple[Evaluated, ...]
    losses: tuple[float, ...]
    """Of each step: the mean of its two forward passes. Empty where they were not kept."""
    train_s: float | None
    """Of the steps alone; `None`: not kept."""
    device: str
    model: str
    note: str = ""
    """Where the numbers are from, if not from this script's own file."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all ways are given."""

    job: Job
    classes: tuple[int, ...]
    """The token of each class."""
    data: Data
    pad_id: int


def read_task(
    model: str, train: str, dev: str, seed: int, rows: int, batch_size: int, seq_len: int
) -> tuple[Task, Any]:
    """Of the training file its first rows by the job's own reading; the shape comes along."""
    job = Job(
        model=ModelSource(name=model), batch_size=batch_size, seq_len=seq_len, dtype="fp32", seed=seed,
        data=DataSource(train=train, evaluate=dev, template=TEMPLATE, labels=WORDS), padding="longest",
        checkpointing=False, eval_batches=10**6,
    )  # fmt: skip
    shape = resolve_shape(job)
    tokenized = tokenize(job, shape)
    assert tokenized is not None
    table = tokenized.train.select(range(min(rows, len(tokenized.train))))
    data = batches_of(replace(tokenized, train=table), job)
    words = candidates_of(TEMPLATE, WORDS, load_tokenizer(job.model, shape.vocabulary), shape.head)
    return Task(job=job, classes=words.tokens, data=data, pad_id=tokenized.pad_id), shape


# What every way is judged by.


def rows_of(batch: Batch) -> Iterator[tuple[list[int], int]]:
    """The tokens of each sequence before its label word, and that word's token."""
    inputs = batch.inputs
    for ids, mask, labels in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
    ):
        ids, labels = ids[: int(mask.sum())], labels[: int(mask.sum())]
        (place,) = (labels != -100).nonzero().flatten().tolist()
        assert place == len(ids) - 1
        yield ids[:place].tolist(), int(labels[place])


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, device: str) -> tuple[float, float]:
    """Mean loss over the two words, and accuracy."""
    losses: list[Tensor] = []
    right = 0
    for batch in task.data.evaluation:
        inputs = {name: each.to(device) for name, each in batch.inputs.items() if name != "labels"}
        logits = model(**inputs).logits
        rows = list(rows_of(batch))
        last = torch.tensor([len(ids) - 1 for ids, _ in rows], device=device)
        scores = logits[torch.arange(len(rows), device=device), last][:, list(task.classes)].float()
        wanted = torch.tensor([task.classes.index(word) for _, word in rows], device=device)
        losses.append(nn.functional.cross_entropy(scores, wanted, reduction="none"))
        right += int((scores.argmax(1) == wanted).sum())
    whole = torch.cat(losses)
    return float(whole.mean()), right / len(whole)


def load(task: Task, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(task.job.model.name, dtype=torch.float32)
    return model.to(device).eval()


# The authors' loop.


def as_authors_give_it(batch: Batch, task: Task) -> dict[str, Any]:
    """Each row once with either word, padded on the left; the label says which of them is right."""
    rows = list(rows_of(batch))
    sequences = [[*ids, word] for ids, _ in rows for word in task.classes]
    longest = max(map(len, sequences))
    padding = [longest - len(each) for each in sequences]
    return {
        "input_ids": torch.tensor(
            [[task.pad_id] * n + ids for n, ids in zip(padding, sequences, strict=True)]
        ),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        "labels": torch.tensor([task.classes.index(word) for _, word in rows for _ in task.classes]),
        "option_len": [1] * len(sequences),
        "num_options": [len(task.classes)] * len(sequences),
    }


def loss_of_options(model: nn.Module, inputs: Mapping[str, Any], device: str) -> Tensor:
    """Cross-entropy over the log-likelihoods of the last token of each group of sequences."""
    ids = inputs["input_ids"].to(device)
    logits = model(input_ids=ids, attention_mask=inputs["attention_mask"].to(device)).logits
    logs = torch.log_softmax(logits[:, -2], dim=-1)
    likelihoods = logs.gather(1, ids[:, -1:]).view(-1, inputs["num_options"][0])
    wanted = inputs["labels"].to(device).view(likelihoods.shape)[:, 0]
    return nn.functional.cross_entropy(likelihoods, wanted)


Noise = Callable[[int, int, Tensor], Tensor]
"""Of a tensor's number, the step and its weights: z of it; called in the order of the tensors."""


class Loop:
    """A step of the authors' loop: three perturbations, two losses, one update."""

    def __init__(self, model: nn.Module, task: Task, learning_rate: float, eps: float, device: str) -> None:
        self.model, self.task, self.device = model, task, device
        self.learning_rate, self.eps = learning_rate, eps
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]

    def step(self, batch: Batch, number: int, begin: Callable[[], None], noise: Noise) -> float:
        """`begin` resets the generator of `noise` to the step's seed."""
        inputs = as_authors_give_it(batch, self.task)
        losses = []
        for scale in (1, -2):
            self._move(scale * self.eps, number, begin, noise)
            with torch.inference_mode():
                losses.append(loss_of_options(self.model, inputs, self.device).item())
        slope = (losses[0] - losses[1]) / (2 * self.eps)
        self._move(self.eps, number, begin, noise)
        self._move(-self.learning_rate * slope, number, begin, noise)
        return (losses[0] + losses[1]) / 2

    def _move(self, scale: float, step: int, begin: Callable[[], None], noise: Noise) -> None:
        begin()
        for number, weight in enumerate(self.trained):
            weight.data = weight.data + scale * noise(number, step, weight.data)


def drawn(_: int, __: int, weight: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=weight.size(), device=weight.device, dtype=weight.dtype)


class Way(Protocol):
    """One of the ways to train; `model` has the weights once `look` has been called."""

    model: nn.Module

    def step(self, number: int) -> float:
        """The loss of a step, counted from 0; of `authors` that of its first pass alone."""
        ...

    def look(self) -> None: ...

    def save(self, folder: Path) -> None:
        """All that the next step depends on, into an empty folder."""
        ...

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...


class OneModel:
    """What both loops share: they train the weights of `model` itself, and draw seeds from a generator."""

    def __init__(self, model: Any, generator: Any) -> None:
        self.model: Any = model
        self.generator = generator

    def look(self) -> None: ...

    def save(self, folder: Path) -> None:
        torch.save(self.model.state_dict(), folder / "weights.pt")
        name, keys, *rest = self.generator.get_state(legacy=True)
        (folder / "generator.json").write_text(json.dumps([name, keys.tolist(), *rest]), encoding="utf-8")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        name, keys, *rest = json.loads((folder / "generator.json").read_text(encoding="utf-8"))
        self.generator.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))

    def close(self) -> None: ...


class WayOfLoop(OneModel):
    def __init__(
        self, task: Task, model: Any, learning_rate: float, eps: float, device: str, *, same_noise: bool
    ) -> None:
        super().__init__(model, numpy.random.RandomState(task.job.seed))
        self.task, self.loop = task, Loop(model, task, learning_rate, eps, device)
        self.noise: Noise = self._counted if same_noise else drawn

    def step(self, number: int) -> float:
        seed = int(self.generator.randint(1000000000))
        (batch,) = self.task.data.step_batches(number)

        def begin() -> None:
            torch.manual_seed(seed)

        return self.loop.step(batch, number, begin, self.noise)

    def _counted(self, number: int, step: int, weight: Tensor) -> Tensor:
        key = NoiseKey(seed=self.task.job.seed, step=step, tensor=number)
        return normal(key, weight.numel(), weight.device).view(weight.shape)


class WayOfAuthors(OneModel):
    """By the functions in the authors' files, which draw seeds from numpy's own generator."""

    def __init__(
        self, task: Task, model: Any, learning_rate: float, eps: float, device: str, folder: Path
    ) -> None:
        numpy.random.seed(task.job.seed)
        super().__init__(model, numpy.random)
        self.task = task
        names = {"zo_perturb_parameters", "zo_forward", "zo_step", "zo_update"}
        methods = functions_in(folder / "trainer.py", names)
        (forward,) = functions_in(folder / "utils.py", {"forward_wrap_with_option_len"}).values()
        model.original_forward = model.forward

        class Trainer:
            args = SimpleNamespace(
                zo_eps=eps, weight_decay=0.0, non_diff=False, n_gpu=1, gradient_accumulation_steps=1
            )
            lr_scheduler = SimpleNamespace(step=lambda: None)

            def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
                return {
                    name: each.to(device) if isinstance(each, Tensor) else each
                    for name, each in inputs.items()
                }

            def compute_loss_context_manager(self) -> Any:
                return torch.inference_mode()

            def compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
                loss: Tensor = forward(model, **inputs, return_dict=True).loss
                return loss

            def _get_learning_rate(self) -> float:
                return learning_rate

        self.trainer: Any = type("Authors", (Trainer,), methods)()

    def step(self, number: int) -> float:
        (batch,) = self.task.data.step_batches(number)
        loss = self.trainer.zo_step(self.model, as_authors_give_it(batch, self.task))
        self.trainer.zo_update(self.model)
        return float(loss)


def functions_in(path: Path, names: set[str]) -> dict[str, Any]:
    """Those functions of a Python file, wherever they stand in it, compiled by themselves."""
    import torch.nn.functional as functional
    from torch.nn import CrossEntropyLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast

    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef) and each.name in names]
    space: dict[str, Any] = {
        "torch": torch, "np": numpy, "F": functional, "CrossEntropyLoss": CrossEntropyLoss,
        "CausalLMOutputWithPast": CausalLMOutputWithPast,
    }  # fmt: skip
    module = ast.Module(body=list(found), type_ignores=[])
    exec(compile(module, str(path), "exec"), space)
    return {name: space[name] for name in names}


# Ours.


class WayOfEngine:
    def __init__(
        self, task: Task, shape: Any, model: Any, learning_rate: float, eps: float, device: str, steps: int
    ) -> None:
        job = task.job
        self.task, self.model = task, model
        self.engine = Mezo(
            MezoSettings(learning_rate=learning_rate, eps=eps),
            Context(device=device, workload=job.workload, seed=job.seed, total_steps=steps),
        )
        blueprint = make_blueprint(job, shape, task.data.step_batches(0)[0])
        self.engine.setup(blueprint)
        blueprint.release()

    def step(self, number: int) -> float:
        return self.engine.step(self.task.data.step_batches(number)).loss

    @torch.no_grad()
    def look(self) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in self.engine.weights():
            own[name].copy_(weight)

    def save(self, folder: Path) -> None:
        self.engine.save(folder)

    def load(self, folder: Path) -> None:
        self.engine.load(folder)

    def close(self) -> None:
        self.engine.close()


def way_of(kind: str, task: Task, shape: Any, asked: argparse.Namespace) -> Way:
    rate, eps, device = asked.learning_rate, asked.eps, asked.device
    model = load(task, device)
    if kind == "engine":
        return WayOfEngine(task, shape, model, rate, eps, device, asked.steps)
    if kind == "authors":
        return WayOfAuthors(task, model, rate, eps, device, Path(asked.authors))
    return WayOfLoop(task, model, rate, eps, device, same_noise=kind == "same-noise")


# Curves and the weights beside them.


def train(kind: str, seed: int, asked: argparse.Namespace) -> Curve:
    """From the start, or from where the curve in `asked.out` was left."""
    task, shape = read_task(
        asked.model, asked.train, asked.dev, seed, asked.rows, asked.batch_size, asked.seq_len
    )
    place = Place(asked.out, f"{kind}-{seed}", settings_of(asked))
    with closing(way_of(kind, task, shape, asked)) as way:
        curve, left = place.read(), place.weights()
        if curve is not None and left is None and curve.evaluations[-1].step > 0:
            raise UserError(f"{place.path} cannot be gone on with", "it has no weights beside it", ELSEWHERE)
        if curve is not None and left is not None:
            step, folder = left
            way.load(folder)
            curve = replace(
                curve, losses=curve.losses[:step],
                evaluations=tuple(each for each in curve.evaluations if each.step <= step),
            )  # fmt: skip
            print(kind, seed, f"goes on after step {step}", flush=True)
        else:
            curve = Curve(
                kind=kind, seed=seed, learning_rate=asked.learning_rate, eps=asked.eps, evaluations=(),
                losses=(), train_s=0.0, device=asked.device, model=Path(asked.model).name,
            )  # fmt: skip
        while not is_complete(curve, asked.steps):
            if curve.evaluations:
                curve = trained_on(curve, way, asked)
            step = len(curve.losses)
            way.look()
            loss, accuracy = evaluate(way.model, task, asked.device)
            evaluated = Evaluated(step=step, loss=loss, accuracy=accuracy)
            curve = replace(curve, evaluations=(*curve.evaluations, evaluated))
            print(kind, seed, evaluated, flush=True)
            place.keep(curve, way, last=is_complete(curve, asked.steps))
    return curve


def trained_on(curve: Curve, way: Way, asked: argparse.Namespace) -> Curve:
    """To the next evaluation, or to a loss that is not finite."""
    losses, began = list(curve.losses), time.perf_counter()
    for number in range(len(losses), min(asked.steps, len(losses) + asked.every)):
        losses.append(way.step(number))
        if not math.isfinite(losses[-1]):
            break
    seconds = (curve.train_s or 0.0) + time.perf_counter() - began
    return replace(curve, losses=tuple(losses), train_s=seconds)


def is_complete(curve: Curve, steps: int) -> bool:
    """Its last step is evaluated, or its losses were no longer finite."""
    ended = len(curve.losses) >= steps or not all(map(math.isfinite, curve.losses))
    return ended and bool(curve.evaluations) and curve.evaluations[-1].step == len(curve.losses)


def settings_of(asked: argparse.Namespace) -> dict[str, Any]:
    """What a curve that is gone on with must have been begun with; the number of steps may grow."""
    names = ("learning_rate", "eps", "rows", "batch_size", "seq_len", "device")
    return {"model": Path(asked.model).name, **{name: getattr(asked, name) for name in names}}


class Place:
    """Where a curve is kept, and until it is complete the weights of its last evaluation."""

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.name, self.settings = folder, name, settings
        self.path = folder / f"{name}.json"

    def read(self) -> Curve | None:
        return read_curve(self.path) if self.path.exists() else None

    def weights(self) -> tuple[int, Path] | None:
        """The step they are of, and their folder."""
        found = [(int(each.name.rpartition("-")[2]), each) for each in self.folder.glob(f"{self.name}.at-*")]
        if not found:
            return None
        step, folder = max(found)
        begun = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        if begun != self.settings:
            names = ", ".join(name for name in self.settings if begun.get(name) != self.settings[name])
            raise UserError(
                f"{self.path} cannot be gone on with", f"it was begun with another {names}", ELSEWHERE
            )
        return step, folder

    def keep(self, curve: Curve, way: Way, *, last: bool) -> None:
        """The curve first: weights without their evaluation would be gone on from without it."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(asdict(curve)), encoding="utf-8")
        os.replace(new, self.path)
        old = list(self.folder.glob(f"{self.name}.at-*"))
        if not last:
            folder = self.folder / f"{self.name}.making"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            way.save(folder)
            (folder / "settings.json").write_text(json.dumps(self.settings), encoding="utf-8")
            os.rename(folder, self.folder / f"{self.name}.at-{len(curve.losses)}")
        for each in old:
            shutil.rmtree(each)


# The judgement.


def read_curves(folder: Path) -> list[Curve]:
    return [read_curve(path) for path in sorted(folder.glob("*.json"))]


def read_curve(path: Path) -> Curve:
    values = json.loads(path.read_text(encoding="utf-8"))
    values["evaluations"] = tuple(Evaluated(**each) for each in values["evaluations"])
    return Curve(**{**values, "losses": tuple(values["losses"])})


def difference(a: Curve, b: Curve) -> tuple[float, int]:
    """The largest one between their losses on development data, at the steps that both have, and the last."""
    mine, others = ({each.step: each.loss for each in curve.evaluations} for curve in (a, b))
    shared = mine.keys() & others.keys()
    return max(abs(mine[step] - others[step]) for step in shared), max(shared)


def standard_errors_apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Between the means of both."""
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    apart = abs(statistics.fmean(ours) - statistics.fmean(theirs))
    return apart / error if error else (math.inf if apart else 0.0)


def table(curves: Sequence[Curve]) -> Iterator[str]:
    """Lines of Markdown."""
    kinds = {kind: of for kind in KINDS if (of := [each for each in curves if each.kind == kind])}
    at: dict[tuple[str, int], list[Evaluated]] = {}
    for curve in curves:
        for each in curve.evaluations:
            at.setdefault((curve.kind, each.step), []).append(each)
    steps = sorted({step for _, step in at})
    yield "| step | " + " | ".join(f"{kind} ({len(of)} seeds)" for kind, of in kinds.items()) + " |"
    yield "| ---: |" + " --- |" * len(kinds)
    for step in steps:
        yield f"| {step} | " + " | ".join(_cell(at.get((kind, step), [])) for kind in kinds) + " |"
    yield ""
    for one, other in (("engine", "same-noise"), ("authors", "loop")):
        by_seed = {each.seed: each for each in kinds.get(other, [])}
        pairs = [(each, by_seed[each.seed]) for each in kinds.get(one, []) if each.seed in by_seed]
        for a, b in pairs:
            most, last = difference(a, b)
            yield f"{one} and {other}, seed {a.seed}: losses differ by {most:.3g} at most, to step {last}"
    theirs = "authors" if "authors" in kinds else "loop"
    for step in steps[1:]:
        ours = [each.loss for each in at.get(("engine", step), [])]
        others = [each.loss for each in at.get((theirs, step), [])]
        if len(ours) > 1 and len(others) > 1:
            yield f"step {step}: {standard_errors_apart(ours, others):.2f} standard errors apart"


def _cell(found: Sequence[Evaluated]) -> str:
    if not found:
        return ""
    loss = [each.loss for each in found]
    accuracy = statistics.fmean(each.accuracy for each in found)
    return f"{statistics.fmean(loss):.4f} ({min(loss):.4f} to {max(loss):.4f}), {accuracy:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    for name in ("--model", "--train", "--dev"):
        run.add_argument(name, required=True)
    run.add_argument("--authors", help="folder with the authors' trainer.py and utils.py")
    run.add_argument("--kinds", default="engine,loop,same-noise")
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--steps", type=int, default=600)
    run.add_argument("--every", type=int, default=100)
    run.add_argument("--learning-rate", type=float, default=1e-5)
    run.add_argument("--eps", type=float, default=1e-3)
    run.add_argument("--rows", type=int, default=1000, help="of the training file")
    run.add_argument("--batch-size", type=int, default=16)
    run.add_argument("--seq-len", type=int, default=64)
    run.add_argument("--device", default="cpu")
    run.add_argument("--resume", action="store_true", help="go on with what OUT has begun")
    shown = commands.add_parser("table")
    shown.add_argument("out", type=Path)
    asked = parser.parse_args()
    try:
        if asked.command == "run":
            run_all(asked)
        print("\n".join(table(read_curves(asked.out))))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def run_all(asked: argparse.Namespace) -> None:
    """Every kind and seed that `asked.out` does not have complete."""
    kinds = asked.kinds.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UserError("--kinds", f"there is no '{unknown[0]}'", f"choose from: {', '.join(KINDS)}")
    if "authors" in kinds and asked.authors is None:
        raise UserError("--kinds authors", "needs the authors' files", "name their folder with --authors")
    asked.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, asked.seeds.split(",")):
        for kind in kinds:
            path = asked.out / f"{kind}-{seed}.json"
            if path.exists() and is_complete(read_curve(path), asked.steps):
                continue
            if path.exists() and not asked.resume:
                raise UserError(
                    f"{path} is there", f"it has not its {asked.steps} steps", "go on with --resume"
                )
            train(kind, seed, asked)


if __name__ == "__main__":
    main()
