"""Text from a model whose blocks may live in host memory, one token of every prompt at a time.

A decoding step is one pass over the blocks for the whole batch:

    the newest token of each sequence -> embedding -> every block, once -> head -> the next token

The first step (the *prefill*) does the same with the whole prompts. Keys and values stay on the GPU in
transformers' static cache, of the size that the longest sequence will have: nothing grows, so what is needed
is known and refused before it starts. Prompts of unequal length are padded on the left, so that all
sequences are at the same place.

A model that keeps something else of the past than keys and values in every block (a state-space layer, a
cache of its own) runs its whole text again for every token: the weights come up as often, the products grow
with the text.

The token stays on the GPU, where the next step begins with it. A copy goes to the host behind the step; it is
read when the next step is under way, so the host never waits for the step that it has just started, and an
end of all sequences is seen one step late. Blocks of the next step come up over the head and the choice of
the token (`engines.offload.ring`).

Sampling is temperature, top-k and top-p in this order, by transformers' own warpers, then one draw: of
p_i / e_i with e_i exponential the largest is at i with probability p_i. The same seed, batch and kind of
device give the same tokens.

On the GPU, beside what the engine has there: the cache, the hidden states of one step, the logits of one
position per sequence. On the host: the tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    StaticCache,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engines.decoding import GenerationRequest, Sampling
from engines.errors import InfeasiblePlan, UserError
from engines.model.blocks import find_blocks, sent
from engines.model.model_check import FAILURES
from engines.quantized.block_form import damaged_tiles
from engines.transfer.compute_clock import ComputeClock
from engines.zeroth_order.perturbed_model import PerturbedModel

NO_TOKEN = -1

_cuda: Any = torch.cuda  # most of it is without annotations


def generate_tokens(
    model: PerturbedModel,
    request: GenerationRequest,
    blocks: Callable[[], Iterator[int]],
    clock: ComputeClock,
    vram_bytes: int | None,
) -> Iterator[tuple[int, ...]]:
    """The next token of each prompt, step by step.

    `blocks` begins a pass: it gives each block's index while its weights are there. Nothing else may use
    them until the generation has ended or was given up. Raises `UserError` where weights were damaged that a
    token was made with.
    """
    refuse_what_generates_nothing(model.transformer)
    device = model.device
    cache = None
    if keeps_keys_and_values(model):
        cache = make_cache(model, len(request.prompts), request.cache_tokens, vram_bytes)
    batch = _Padded(request, device)
    choose = _Choice(request.sampling, device)
    ends = sent(torch.tensor(request.end_ids or (NO_TOKEN,), dtype=torch.int64), device)
    ended = torch.zeros(len(request.prompts), dtype=torch.bool, device=device)
    echoes = [_Echo(len(request.prompts), model.scratch.damaged) for _ in range(2)]
    ids = batch.ids
    open_rows = set(range(len(request.prompts)))
    for step in range(request.max_new_tokens):
        clock.start()
        inputs = batch.inputs(ids, step) if cache is not None else batch.whole(model, step)
        hidden, calls = model.enter_cached(inputs, cache, padded=batch.padded)
        for index in blocks():
            hidden = model.run(index, calls, hidden)
        token = choose(_next_logits(model, ids[:, -1:], hidden[:, -1:]))
        token = token.masked_fill(ended, request.pad_id)
        ended |= (token.unsqueeze(1) == ends).any(1)
        echoes[step % 2].send(token)
        clock.stop()
        ids = token.unsqueeze(1)
        if cache is None:
            batch.ids = torch.cat((batch.ids, ids), 1)
        if step > 0:
            tokens = echoes[(step - 1) % 2].read()
            yield tokens
            open_rows -= {row for row in open_rows if tokens[row] in request.end_ids}
            if not open_rows:
                return
    yield echoes[(request.max_new_tokens - 1) % 2].read()


def _next_logits(model: PerturbedModel, ids: Tensor, hidden: Tensor) -> Tensor:
    """Raises `UserError` for a model whose end takes more than the last token."""
    try:
        return model.next_logits(ids, hidden)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        name = type(model.transformer).__name__
        raise UserError(name, "cannot be continued token by token", "use another decoder") from error


def refuse_what_generates_nothing(model: Any) -> None:
    """Raises `UserError` for an encoder, and for a head that has no vocabulary."""
    name = type(model).__name__
    if not model.can_generate() and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UserError(name, "is an encoder, which generates no text", "use a decoder")
    if model.get_output_embeddings() is None:
        raise UserError(name, "has no head over a vocabulary", "use a causal language model")
    if _own_inputs(model):
        raise UserError(name, "needs inputs of its own when it generates", "use another decoder")


_KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "cache_position"}


def _own_inputs(model: Any) -> bool:
    """Whether the model prepares tensors for each token that are not given here, as XLNet's permutations."""
    kind = type(model)
    if kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return False
    try:
        prepared = model.prepare_inputs_for_generation(
            torch.zeros((1, 2), dtype=torch.int64), use_cache=False
        )
    except FAILURES:
        return False  # it asks for more than is here, such as a cache; the tokens will tell
    return any(isinstance(each, Tensor) and name not in _KNOWN_INPUTS for name, each in prepared.items())


class _Padded:
    """The prompts as one batch on the device, and the inputs of each step.

    Mask and positions are made once, on the host, for the longest sequence there will be: a step takes a
    slice of them. Places that are not written yet are in the mask; causality hides them.
    """

    def __init__(self, request: GenerationRequest, device: torch.device) -> None:
        length = request.prompt_tokens
        rows = [[request.pad_id] * (length - len(prompt)) + list(prompt) for prompt in request.prompts]
        mask = torch.ones((len(rows), request.cache_tokens), dtype=torch.int64)
        for row, prompt in enumerate(request.prompts):
            mask[row, : length - len(prompt)] = 0
        self.padded = bool((mask == 0).any())
        self.ids = sent(torch.tensor(rows, dtype=torch.int64), device)
        self._mask = sent(mask, device)
        self._positions = sent((mask.cumsum(1) - 1).clamp(min=0), device)
        self._length = length

    def inputs(self, ids: Tensor, step: int) -> Mapping[str, Tensor]:
        """`ids` (batch, seq) of the whole prompts in step 0, then (batch, 1) of the newest tokens."""
        first, last = (0, self._length) if step == 0 else (self._length + step - 1, self._length + step)
        return {
            "input_ids": ids,
            "attention_mask": self._mask,
            "position_ids": self._positions[:, first:last],
        }

    def whole(self, model: PerturbedModel, step: int) -> Mapping[str, Tensor]:
        """The texts so far, for a model without a cache."""
        last = self._length + step
        named = {
            "input_ids": self.ids,
            "attention_mask": self._mask[:, :last],
            "position_ids": self._positions[:, :last],
        }
        return {name: each for name, each in named.items() if model.takes(name)}


def keeps_keys_and_values(model: PerturbedModel) -> bool:
    """Whether every block keeps keys and values in transformers' static cache, and nothing else is kept.

    Found out by running the blocks on one token twice, with whatever weights are there.
    """
    config = model.transformer.config
    one = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    ones = one.new_ones((1, 2))
    if not model.takes("past_key_values") or _masks_by_length(model.transformer):
        return False
    try:
        tried = StaticCache(config=config, max_cache_len=2)
        for place in (0, 1):
            inputs = {"input_ids": one, "attention_mask": ones, "position_ids": one + place}
            model.try_cached(inputs, tried)
    except torch.OutOfMemoryError:
        raise
    except FAILURES:
        return False
    return all(isinstance(getattr(layer, "keys", None), Tensor) for layer in tried.layers)


def _masks_by_length(model: Any) -> bool:
    """Whether blocks cut their own causal mask out of a square one, by the length of the keys so far. A
    static cache has its final length from the start."""
    _, blocks = find_blocks(model)
    return any(buffer.dim() >= 3 and buffer.shape[-1] == buffer.shape[-2] for buffer in blocks.buffers())


def make_cache(model: PerturbedModel, batch_size: int, tokens: int, vram_bytes: int | None) -> StaticCache:
    """An empty cache of `tokens` positions for each sequence, in memory.

    What a layer keeps of a token is found out by running it on one, with whatever weights are there; the
    model `keeps_keys_and_values`. Raises `InfeasiblePlan` if the cache does not fit.
    """
    config = model.transformer.config
    tried = StaticCache(config=config, max_cache_len=1)
    one = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    model.try_cached({"input_ids": one, "attention_mask": one + 1, "position_ids": one}, tried)
    cache = StaticCache(config=config, max_cache_len=tokens)
    pairs = list(zip(cache.layers, tried.layers, strict=True))
    element = pairs[0][1].keys.element_size()
    needed_bytes = sum(
        batch_size * layer.max_cache_len * element * _numel_per_token(like) for layer, like in pairs
    )
    _refuse_too_little_gpu_memory(needed_bytes, batch_size, tokens, model.device, vram_bytes)
    for layer, like in pairs:
        layer.lazy_initialization(*(_of_batch(each, batch_size) for each in (like.keys, like.values)))
    return cache


def _numel_per_token(layer: Any) -> int:
    return int(sum(each.shape[1] * each.shape[3] for each in (layer.keys, layer.values)))


def _of_batch(one: Tensor, batch_size: int) -> Tensor:
    """States (1, heads, 1, width) as those of a batch, without memory of their own."""
    return one.expand(batch_size, *one.shape[1:])


def _refuse_too_little_gpu_memory(
    needed_bytes: int, batch_size: int, tokens: int, device: torch.device, vram_bytes: int | None
) -> None:
    if device.type != "cuda":
        return
    allocated_bytes = torch.cuda.memory_allocated(device)
    free_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated_bytes
    if vram_bytes is not None:
        free_bytes = min(free_bytes, vram_bytes - allocated_bytes)
    if needed_bytes > free_bytes:
        raise InfeasiblePlan(
            f"{(needed_bytes - free_bytes) / 1e9:.3g} GB of GPU memory are missing: the key-value cache of "
            f"{batch_size} x {tokens} tokens takes {needed_bytes / 1e9:.3g} GB, and "
            f"{max(0, free_bytes) / 1e9:.3g} GB are free; give fewer prompts or new tokens"
        )


class _Choice:
    """Chooses tokens (batch,) int64 from logits (batch, vocabulary), on their device."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._greedy = sampling.temperature == 0
        self._warpers = LogitsProcessorList()
        if self._greedy:
            return
        self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self._generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        if self._greedy:
            return logits.argmax(-1)
        scores: Tensor = self._warpers(None, logits.float())
        # In place of torch.multinomial, which checks its input on the host.
        chances = scores.softmax(-1)
        return chances.div_(torch.empty_like(chances).exponential_(generator=self._generator)).argmax(-1)


class _Echo:
    """Tokens of one step on their way to the host, and whether weights that made them were damaged.

    HAZARD: both are read a step late. To ask the device for either at once would hold the host until the head
    is done, and the link would have nothing to do meanwhile.
    """

    def __init__(self, batch_size: int, damaged: Tensor) -> None:
        on_gpu = damaged.is_cuda
        self._host = torch.empty(batch_size + 1, dtype=torch.int64, pin_memory=on_gpu)
        self._damaged = damaged
        self._event = _cuda.Event(blocking=True) if on_gpu else None

    def send(self, token: Tensor) -> None:
        """In the order of the compute stream; the host goes on."""
        self._host.copy_(torch.cat((token, self._damaged)), non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(token.device))

    def read(self) -> tuple[int, ...]:
        """Waits for the step that sent them."""
        if self._event is not None:
            self._event.synchronize()
        *tokens, damaged = self._host.tolist()
        if damaged:
            raise damaged_tiles()
        return tuple(tokens)
