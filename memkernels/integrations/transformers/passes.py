"""The hooks of an attachment: what they do in a forward pass. A pass is a Step; its states are committed once."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...ops import cache_logprobs, cache_nll
from .cache import current_tokens, given_cache, remember, returned_cache
from .memory import Memory, Mixture, Read, Step, no_entries
from .place import Place

_IGNORED = -100  # the label of a token that has no loss


class Passes:
    """What the hooks share. enabled: False while an attachment is disabled. reading: read_in is at work. loss_only: no
    logits where there are labels. targets: those of :meth:`scoring`."""

    def __init__(self, place: Place, memories: Sequence[Memory]):
        self.place, self.memories = place, tuple(memories)
        self.enabled, self.reading = True, False
        self.reads: dict[str, Read] = {}
        self.step: Step | None = None  # the pass that is under way in the decoder
        self.done: Step | None = None  # the pass whose logits are under way
        self.labels: Tensor | None = None
        self.targets: Tensor | None = None
        self.loss_only = False
        self.logits_to_keep: int | Tensor = 0
        # Input of a block -> its pass, for transformers that checkpoint a block with its hooks: the replay in the
        # backward pass gets the same input, perhaps after other forward passes.
        self.replays = WeakIdKeyDictionary()

    # --- the decoder ---

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the decoder: a new step."""
        self.step = self.done = None
        if not self.enabled:
            return
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments if len(args) > 1 else kwargs
        ids = args[0] if args else given.get("input_ids")
        tokens: Any = given.get("inputs_embeds") if ids is None else ids
        cache, mask = given_cache(given), given.get("attention_mask")
        length = tokens.shape[1]
        if mask is None and length > 1 and not torch.compiler.is_compiling():
            self._check_unmasked(ids, given.get("position_ids"))
        old = getattr(cache, "memory_states", {})
        step = Step(ids, current_tokens(mask, length, cache), cache, old)
        step.labels, step.logits_to_keep, step.reading = self.labels, self.logits_to_keep, self.reading
        for memory in self.memories:
            memory.begin(step)
        self.step = step

    def end(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder: the one place where states are committed."""
        step, self.step = self.step, None
        if step is None:
            return
        step.hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state
        for memory in self.memories:
            memory.finish(step)
        cache = returned_cache(output)
        cache = step.cache if cache is None else cache
        if cache is not None and (step.new or step.reads):
            self._commit(remember(cache), step)
        elif step.reads and not torch.compiler.is_compiling():
            self.reads = step.reads
        self.done = step

    def _commit(self, cache: Any, step: Step) -> None:
        cache.memory_states = {**cache.memory_states, **step.new}
        for name in step.new:
            cache.memory_owners[name] = self.memories[int(name.partition(".")[0])]
        if step.reads and not torch.compiler.is_compiling():
            before = cache.memory_reads
            cache.memory_reads = {name: _joined(before.get(name), read) for name, read in step.reads.items()}
            self.reads = cache.memory_reads

    def _check_unmasked(self, ids: Any, positions: Any) -> None:
        """Refuse what cannot be told from a text without padding when there is no mask."""
        config: Any = self.place.decoder.config
        pad = getattr(config, "pad_token_id", None)
        special = (getattr(config, "eos_token_id", None), getattr(config, "bos_token_id", None))
        padded = ids is not None and ids.shape[0] > 1 and pad is not None and pad not in special
        if padded and bool((ids[:, 0] == pad).any()):
            raise ValueError("memory: attention_mask must be given with a batch padded on the left, got None")
        apart = [type(memory).__name__ for memory in self.memories if not memory.packed]
        several = apart and positions is not None and positions.dim() == 2
        if several and bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise ValueError(f"memory: {apart[0]} must have one text per row, got position_ids that begin again")

    # --- blocks and modules in them ---

    def after(self, layer: int) -> Callable[..., Any]:
        """The hook of a block."""
        memories = [memory for memory in self.memories if layer in memory.layers]

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if not self.enabled:
                return None
            step = self._step_of(module, args[0] if args else kwargs.get("hidden_states"))
            hidden = output[0] if isinstance(output, tuple) else output
            for memory in memories:
                hidden = memory.after_block(layer, hidden, step)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _step_of(self, block: nn.Module, given: Any) -> Step:
        """The pass under way, or in a replay that of the pass which is replayed."""
        checkpoints = block.training and getattr(block, "gradient_checkpointing", False)
        if self.step is not None:
            if checkpoints and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.replays[given] = self.step
            return self.step
        step = self.replays.get(given) if isinstance(given, Tensor) else None
        if step is None:
            raise RuntimeError(
                "memory: gradient checkpointing must have use_reentrant=False, got a replay of another input"
            )
        return step

    def note(self, name: str) -> Callable[..., None]:
        """The pre-hook of a module whose input is wanted."""

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.step is not None:
                self.step.inputs[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def instead(self, memory: Memory, layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the forward of a module that is replaced."""

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return forward(*args, **kwargs)
            return memory.replace(layer, args[0] if args else next(iter(kwargs.values())))

        return replaced

    # --- the causal language model ---

    def call(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the causal language model: labels are kept back, as the loss is that of the mixture."""
        self.labels, self.logits_to_keep = None, 0
        if not self.enabled:
            return None
        self.labels, self.logits_to_keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        return args, {**kwargs, "labels": None}

    def mix(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After it: log-probabilities of the mixture, and their loss; in :meth:`scoring` the loss of each token alone.

        The logits are read in their dtype. They are large: a copy in float32 costs as much as the mixture.
        """
        step, labels = self.done, self.labels
        self.done = self.labels = None
        if not self.enabled or step is None:
            return None
        if isinstance(output, tuple):
            raise TypeError("memory: return_dict must be True beside a memory that changes probabilities, got a tuple")
        if output.logits is None:
            raise RuntimeError(
                "memory: the model must return logits to be mixed, got none (a fused loss, such as Liger's)"
            )
        logits, last = output.logits, None
        for memory in self.memories:
            if memory.mixes:
                logits = logits if last is None else cache_logprobs(logits, *last)
                last = _exact(memory.mixture(step, logits), logits.dtype)
        if self.targets is not None:
            output.logits, output.loss = None, _nll(logits, last, self.targets)
            return output
        if labels is not None:
            output.loss = self._loss(module, logits, last, labels, kwargs)
        if labels is not None and self.loss_only and last is not None:
            output.logits = None
        else:
            output.logits = logits if last is None else cache_logprobs(logits, *last)
        return output

    @contextlib.contextmanager
    def scoring(self, targets: Tensor) -> Iterator[None]:
        """In this block the model gives no logits, and as its loss that of each of ``targets`` ``[B, S]``."""
        self.targets = targets
        try:
            yield
        finally:
            self.targets = None

    def _loss(
        self, module: Any, logits: Tensor, mixture: Mixture | None, labels: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """The mean over the labels that count, or their sum over ``num_items_in_batch``, as transformers has it."""
        if mixture is None:
            known = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            return module.loss_function(logits=logits, labels=labels, vocab_size=module.config.vocab_size, **known)
        targets = labels[:, 1:].to(logits.device)
        counts = targets != _IGNORED
        nll = _nll(logits[:, :-1], Mixture(*(x[:, :-1] for x in mixture)), targets.masked_fill(~counts, -1)).sum()
        items = kwargs.get("num_items_in_batch")
        return nll / (counts.sum() if items is None else torch.as_tensor(items, device=nll.device))


def _exact(mixture: Mixture | None, dtype: torch.dtype) -> Mixture | None:
    """In the dtypes of a mixture with logits of ``dtype``."""
    if mixture is None:
        return None
    exact = torch.promote_types(dtype, torch.float32)
    return Mixture(mixture.scores.to(exact), mixture.tokens, mixture.mix.to(exact))


def _nll(logits: Tensor, mixture: Mixture | None, targets: Tensor) -> Tensor:
    """The loss ``[B, S]`` of targets, 0 where one is -1."""
    return cache_nll(logits, targets, *(no_entries(logits) if mixture is None else mixture))


def _joined(before: Read | None, read: Read) -> Read:
    return read if before is None else Read(*(torch.cat(pair, 1) for pair in zip(before, read)))
