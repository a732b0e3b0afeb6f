"""A model's blocks and loss as a training step runs them: compiled or eager, recomputed or kept.

What a compiler adds to a transformer block is elementwise work in fewer kernels: in eager PyTorch a block of
Llama's kind reads and writes its hidden states some forty times beside its products. Blocks are compiled one
by one and share their code, so that one graph serves all blocks of a kind; the loss over the vocabulary is a
region of its own, and the rest of the model stays as it is.

A recomputed block keeps its input alone and runs again in the backward pass (activation checkpointing, arXiv
1604.06174). The first blocks are: their activations would be kept longest. Where it is compiled, the compiler
sees that nobody needs the result of the second run, and leaves out its last product: 22 % of a forward pass
of Llama's kind.

Between the two, a block may keep what matrix products and attention give and nothing else (`keeps`): what
lies between them is computed again, which takes no operations to speak of, only memory traffic. Of Llama's
kind that is two thirds of what a compiler keeps. The bits are the same.

A compiled region rounds fewer intermediate results to the weights' precision than eager kernels do, so its
results are close to eager ones and not equal; eager regions, recomputed or kept, have the bits of the model's
own forward and backward pass.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from engines.errors import UserError, first_line
from engines.kernels.triton_launch import has_c_compiler
from engines.model.blocks import find_blocks
from engines.model.randomness import draws_random_numbers

MOST_FORMS = 64
"""Forms of one block's code that are compiled before the compiler gives up: kinds of layers, padded or not,
with and without gradients."""

Keeps = Literal["all", "products"]
"""What a block that is not run again keeps for its backward pass."""

_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""torch's operations whose results are kept, those that this version of it has."""

_aten: Any = torch.ops.aten
_keeping_products = partial(
    create_selective_checkpoint_contexts,
    [getattr(_aten, name).default for name in _PRODUCTS if hasattr(_aten, name)],
)


class TrainingRegions:
    """Stands in the place of a model's blocks and loss until `remove`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        compiled: bool,
        recomputed: int,
        falls_back: bool = False,
        compiles_loss: bool = True,
        keeps: Keeps = "all",
        within: bool = True,
    ) -> None:
        """The first `recomputed` blocks are run again in the backward pass. Nothing is compiled yet: that
        happens when a block first meets inputs of a form. `falls_back`: where it fails then, blocks run
        without from that one on; else the compiler's error is the step's. `compiles_loss`: where blocks are
        compiled, the loss over the vocabulary is, too. `keeps`: what the other blocks keep. `within`: as in
        `compiled_block`.

        Raises `UserError` for a model without a row of blocks, and for one that draws random numbers and is
        to keep products alone.
        """
        self._model: Any = model
        _, self._blocks = find_blocks(model)
        self._loss: Callable[..., Any] | None = None
        self.why_not_compiled: str | None = None
        """What the compiler said where it failed and blocks run without; `None`: it has not."""
        draws = draws_random_numbers(model)
        if draws and keeps == "products":
            # HAZARD: what is kept is not drawn again, and what follows would draw other numbers.
            raise UserError(
                "kept_activations=products",
                "the model draws random numbers in training, which would not be the same again",
                "set dropout=0, or kept_activations=all",
            )
        for index, block in enumerate(self._blocks):
            own: Callable[..., Any] = block.forward
            if keeps == "products" and index >= recomputed:
                own = partial(run_keeping_products, block.forward)
            if compiled:
                run = compiled_block(own, is_recomputed=index < recomputed, draws=draws, within=within)
                if falls_back:
                    eager = partial(recomputed_run, own, draws)
                    run = partial(self._or_eager, run, eager if index < recomputed else own)
            elif index < recomputed:
                run = partial(recomputed_run, own, draws)
            elif keeps == "products":
                run = own
            else:
                continue
            vars(block)["forward"] = run
        if compiled and compiles_loss and getattr(model, "loss_type", None) == "ForCausalLM":
            its: Any = self._model
            self._loss = its.loss_function
            loss = torch.compile(its.loss_function, dynamic=False)
            if falls_back:
                loss = partial(self._or_eager, partial(_in_any_step, loss), self._loss)
            its.loss_function = loss

    def _or_eager(self, run: Callable[..., Any], eager: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.why_not_compiled is not None:
            return eager(*args, **kwargs)
        try:
            return run(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything of the block has run
            self.why_not_compiled = first_line(error)
            return eager(*args, **kwargs)

    def remove(self) -> None:
        """The model's own forward runs again. May be called twice."""
        for block in self._blocks:
            vars(block).pop("forward", None)
        if self._loss is not None:
            self._model.loss_function, self._loss = self._loss, None


def _in_any_step(loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the compiled `loss` gives, also in a step whose blocks are to run without a compiler: without one
    the loss would take twice the memory."""
    compiler: Any = torch.compiler  # its methods are without annotations
    with compiler.set_stance("default"):
        return loss(*args, **kwargs)


def compiled_block(
    forward: Callable[..., Any], *, is_recomputed: bool, draws: bool, within: bool = True
) -> Callable[..., Any]:
    """A block's `forward` through torch's compiler; `draws`: it draws random numbers. Where it is recomputed,
    the compiler sees that and leaves out what nobody needs; not `within`: it does not, and what it keeps for
    the backward pass is let go of whatever it is."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_FORMS)
    # fp32 is fp32 here: what is faster and less precise is the user's to choose, as bf16.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", module="torch._inductor")
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_advice_on_checkpoints)
    if is_recomputed and not within:
        return partial(recomputed_run, torch.compile(forward, dynamic=False), draws)
    run = partial(recomputed_run, forward, draws) if is_recomputed else forward
    return torch.compile(run, dynamic=False)


def recomputed_run(run: Callable[..., Any], draws: bool, *args: Any, **kwargs: Any) -> Any:
    """What `run` gives for these arguments, keeping them alone until it runs again in the backward pass.

    `draws`: it draws random numbers, and has to draw the same ones again.
    """
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)


def run_keeping_products(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `run`, which draws no random numbers, gives for these arguments, keeping them and what its matrix
    products and attention give; the rest is computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    return checkpoint(
        run,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keeping_products,
        **kwargs,
    )


def _is_no_advice_on_checkpoints(record: logging.LogRecord) -> bool:
    """Drops torch's advice against operations in place, said whether there are any or not: without a compiler
    one on a kept result is an error of torch's, and compiled they are none any more."""
    return "context_fn is passed" not in record.getMessage()


def compiles(wanted: bool | Literal["auto"], device: torch.device, notes: list[str]) -> bool:
    """Whether regions are compiled: as `wanted`, `auto` where it pays, and nowhere that it cannot be done.
    Where that is all that keeps them from it, `notes` is told why."""
    why_not = _why_not_on(device)
    if wanted and why_not is not None:
        notes.append(f"not compiled: {why_not}")
        return False
    return device.type == "cuda" if wanted == "auto" else wanted


def _why_not_on(device: torch.device) -> str | None:
    """Why nothing can be compiled for `device` here; `None` if it can."""
    if device.type != "cuda":
        return None
    if find_spec("triton") is None:
        return "Triton is not installed, which torch.compile needs on a GPU"
    if not has_c_compiler():
        return "there is no C compiler, which Triton needs"
    return None
