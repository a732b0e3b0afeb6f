"""Continue prompts with the weights of a model, or of a training run as it is now.

Everything that can be refused is refused before weights are read: a model that generates no text, a prompt
without tokens, a sequence that is too long, memory that is too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from engines import generating_engines
from engines.costs.decoding import Decoding
from engines.decoding import GenerationRequest, Sampling
from engines.errors import UserError
from engines.files.locks import own_folder
from engines.settings.given import GivenSettings
from engines.settings.zeroth_order import MezoSettings
from engines.shapes import ModelShape
from harness.models.configs import load_config
from harness.models.tokenizers import Tokenizer, load_tokenizer
from harness.progress import Progress
from harness.records.job import Job, Limits, ModelSource
from harness.resolve import resolve_shape
from harness.runs.limits import usable_host_bytes
from harness.training.run_folder import TrainingRun, carried_over
from harness.training.train import export_run, rebuilt, set_up, user_errors
from profiles.planning.budget import Budget
from profiles.planning.decoding import fitting
from profiles.planning.plan import EngineSettings

SMALLER = "give fewer or shorter prompts, or less --max-new-tokens"
CHOSEN = ("resident_blocks", "disk_blocks")
"""Settings that are chosen for what is free now, whatever a run was trained with."""
FREE = f"free memory, or {SMALLER}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is to be continued, how far and how."""

    prompts: Sequence[str]
    max_new_tokens: int
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    prompt: str
    text: str
    """What comes after the prompt."""
    tokens: tuple[int, ...]
    """Of `text`, without the one that ended it."""
    ended: bool
    """By a token that ends a text; else all new tokens were made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What `lspzo-bench generate --json` prints."""

    model: str
    step: int | None
    """Training steps in the weights; `None`: not of a training run."""
    engine: str
    settings: EngineSettings
    """What differs from the engine's defaults or was chosen to fit."""
    max_new_tokens: int
    sampling: Sampling
    continuations: tuple[Continuation, ...]


def generate_from_model(job: Job, engine_name: str, wanted: Wanted, progress: Progress) -> Generation:
    """Continue prompts with the weights that `job.model` names. Raises `UserError`."""
    shape = check_decoder(job)
    texts = _Texts(job.model, shape, wanted)
    settings = _fitting(engine_name, shape, texts, job.settings_of(engine_name), job)
    with (
        user_errors(engine_name, job, None),
        set_up(job, shape, engine_name, settings.typed, progress) as (engine, _),
    ):
        made = texts.continued_by(engine, progress)
    return _generation(job, None, engine_name, settings, wanted, made)


def generate_from_run(
    run: TrainingRun, engine_name: str, given: GivenSettings, limits: Limits, wanted: Wanted,
    progress: Progress,
) -> Generation:  # fmt: skip
    """Continue prompts with the weights of a training run, which may be going on.

    `given` are settings that say where weights lie. What a method that does not generate has trained is
    exported beside the run for the time. Raises `UserError`.
    """
    # What it was trained to choose among is no limit to what it may say.
    job = replace(run.job, limits=limits, data=replace(run.job.data, template="", labels=()))
    if run.method.engine not in generating_engines():
        _check_settings(given)
        shape = check_decoder(job)
        _Texts(job.model, shape, wanted)  # what can be refused is, before weights are read
        with own_folder(run.out) as folder:
            exported = export_run(run.out, folder / "model", progress)
            of_export = replace(job, model=ModelSource(name=str(exported)), settings={engine_name: given})
            found = generate_from_model(of_export, engine_name, wanted, progress)
        return replace(found, model=job.model.name, step=run.step)
    typed = _settings_of_run(run, engine_name, given)
    shape = check_decoder(job)
    texts = _Texts(job.model, shape, wanted)
    known = {key: value for key, value in asdict(typed).items() if key not in CHOSEN}
    settings = _fitting(engine_name, shape, texts, GivenSettings({**known, **given}, typed), job)
    with rebuilt(run, job, engine_name, settings.typed, progress) as (engine, _, step):
        made = texts.continued_by(engine, progress)
    return _generation(job, step, engine_name, settings, wanted, made)


def _generation(
    job: Job, step: int | None, engine_name: str, settings: GivenSettings, wanted: Wanted,
    made: tuple[Continuation, ...],
) -> Generation:  # fmt: skip
    return Generation(
        model=job.model.name,
        step=step,
        engine=engine_name,
        settings=settings,
        max_new_tokens=wanted.max_new_tokens,
        sampling=wanted.sampling,
        continuations=made,
    )


def check_decoder(job: Job) -> ModelShape:
    """The shape of the job's model. Raises `UserError` for one that generates no text."""
    shape = resolve_shape(job)
    if shape.head != "causal_lm":
        raise UserError(
            f"model '{job.model.name}'",
            f"has a head for {shape.head.replace('_', ' ')}, and generates no text",
            "use a decoder with a causal language model head",
        )
    return shape


def check_length(shape: ModelShape, prompt_tokens: int, new_tokens: int) -> None:
    """Raises `UserError` if the model does not take so many tokens."""
    if prompt_tokens + new_tokens > shape.max_seq_len:
        raise UserError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones",
            f"{shape.name} takes at most {shape.max_seq_len} tokens",
            SMALLER,
        )


class _Texts:
    """Prompts on their way to tokens and back."""

    def __init__(self, source: ModelSource, shape: ModelShape, wanted: Wanted) -> None:
        """Raises `UserError` for prompts that the model cannot continue."""
        self._prompts = wanted.prompts
        self._tokenizer = load_tokenizer(source, shape.vocabulary)
        rows = [[*self._tokenizer.prefix, *ids] for ids in self._tokenizer.encode(wanted.prompts)]
        for number, row in enumerate(rows, start=1):
            if not row:
                raise UserError(f"prompt {number}", "is empty", "begin it with a word")
        self._request = GenerationRequest(
            prompts=rows,
            max_new_tokens=wanted.max_new_tokens,
            end_ids=end_ids(source, self._tokenizer),
            pad_id=self._tokenizer.pad_id,
            sampling=wanted.sampling,
        )
        check_length(shape, self._request.prompt_tokens, wanted.max_new_tokens)

    def decoding(self, job: Job) -> Decoding:
        """The sizes of it, in the precision of `job`."""
        lengths = {len(row) for row in self._request.prompts}
        return Decoding(
            batch_size=len(self._request.prompts),
            prompt_tokens=self._request.prompt_tokens,
            new_tokens=self._request.max_new_tokens,
            dtype=job.dtype,
            sampled=self._request.sampling.temperature > 0,
            padded=len(lengths) > 1,
        )

    def continued_by(self, engine: Any, progress: Progress) -> tuple[Continuation, ...]:
        steps: list[tuple[int, ...]] = []
        total = self._request.max_new_tokens
        progress.update("generating", 0, total)
        for decoded in engine.generate(self._request):
            steps.append(decoded.tokens)
            progress.update("generating", len(steps), total)
        return tuple(self._continuation(row, [step[row] for step in steps]) for row in range(len(steps[0])))

    def _continuation(self, row: int, ids: Sequence[int]) -> Continuation:
        ends = [place for place, token in enumerate(ids) if token in self._request.end_ids]
        new = tuple(ids[: ends[0]] if ends else ids)
        prompt = self._request.prompts[row]
        # Together: some tokenizers leave out a blank before the first token.
        head, whole = self._tokenizer.decode(prompt), self._tokenizer.decode([*prompt, *new])
        text = whole[len(head) :] if whole.startswith(head) else self._tokenizer.decode(new)
        return Continuation(prompt=self._prompts[row], text=text, tokens=new, ended=bool(ends))


def end_ids(source: ModelSource, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text, by the tokenizer and by the model's configuration, which may name several."""
    stated = load_config(source).get("eos_token_id")
    several = stated if isinstance(stated, list) else [stated]
    return tuple(dict.fromkeys(index for index in (tokenizer.end_id, *several) if isinstance(index, int)))


def _settings_of_run(run: TrainingRun, engine_name: str, given: GivenSettings) -> Any:
    """Typed settings with which the engine takes the steps of `run`. Raises `UserError`."""
    if engine_name not in generating_engines():
        raise UserError(
            f"--engine {engine_name}", "it does not generate", f"use {' or '.join(generating_engines())}"
        )
    _check_settings(given)
    return carried_over(run.settings, given.typed)


def _check_settings(given: GivenSettings) -> None:
    """Raises `UserError` for one that does not say where weights lie."""
    fixed = {field.name for field in fields(MezoSettings)} & set(given)
    if fixed:
        raise UserError(
            f"--set {min(fixed)}",
            "is settled by the run",
            f"set only where weights lie ({', '.join(CHOSEN)})",
        )


def _fitting(
    engine_name: str, shape: ModelShape, texts: _Texts, given: GivenSettings, job: Job
) -> GivenSettings:
    """Raises `UserError` if it does not fit into the memory that is free."""
    settings, why_not = fitting(engine_name, shape, texts.decoding(job), given, _budget(job))
    if why_not is not None:
        raise UserError(engine_name, why_not, FREE)
    return settings


def _budget(job: Job) -> Budget:
    """What is free now, held to the job's limits."""
    gpu_bytes = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
    vram_bytes = job.limits.vram_bytes
    if gpu_bytes is not None and vram_bytes is not None:
        gpu_bytes = min(gpu_bytes, vram_bytes)
    return Budget(
        gpu_bytes=gpu_bytes,
        host_bytes=usable_host_bytes(job.limits.host_bytes),
        pinned_bytes=None,
        gpu_named=vram_bytes is not None,
    )
