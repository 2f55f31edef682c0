"""attach: hooks on the modules of one model, by which memories take part in its forward pass, and how they go again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .fitting import fit
from .memory import Memory, Read
from .passes import Passes
from .place import Place, token_ids
from .saving import save

if TYPE_CHECKING:
    from .trace import Traced


def attach(model: Any, *memories: Memory) -> Attachment:
    """Give a pretrained causal language model one or several memories.

    The memories' parameters become ``model.mk_memory``, a part of the model that its optimizer, ``Trainer`` and
    ``state_dict`` see. Nothing else of the model changes, and :meth:`Attachment.detach` leaves no trace of them.
    Attaching changes no bit of the logits until a memory is trained or given something to read.

    To train the memories alone, call ``model.requires_grad_(False)`` before, or :meth:`Attachment.fit`.

    Args:
        model: a decoder of transformers with a language model's head, such as those of ``AutoModelForCausalLM``; inside
            a PEFT model too.
        memories: at least one, each attached to nothing else.

    Returns:
        The :class:`Attachment`.

    Raises:
        TypeError: the model is no such decoder. ValueError: it has an attachment already, there is no memory, a memory
            is given twice or does not fit. Nothing has been attached then.
    """
    place = Place.of(model)
    if hasattr(place.model, "mk_memory"):
        raise ValueError(
            "attach: model must have no attachment, got one with a memory: detach() it, or attach all at once"
        )
    if not memories:
        raise ValueError("attach: memories must be at least one, got none")
    for memory in memories:
        if not isinstance(memory, Memory):
            raise TypeError(f"attach: memories must be Memory objects, got {type(memory).__name__}")
        if memory.attached or sum(memory is other for other in memories) > 1:
            raise ValueError(f"attach: each memory must be attached once, got a {type(memory).__name__} twice")
    for memory in memories:
        memory.build_once(place)
    return Attachment(place, memories)


class Attachment:
    """Memories at work in a model: what :func:`attach` returns.

    Attributes:
        model: the causal language model. memories: as they were given. reads: name -> :class:`Read`, which slots each
            token read, with what weight: of the last pass, or of the whole text where it came in pieces with a cache.
            Row t is of token t, and tells what the prediction of token t + 1 was made from.
    """

    def __init__(self, place: Place, memories: Sequence[Memory]):
        self.place, self.memories = place, tuple(memories)
        self._handles: list[Any] = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._passes = Passes(place, self.memories)
        for number, memory in enumerate(self.memories):
            memory.name, memory.attached = f"{number}", True
        place.model.mk_memory = nn.ModuleDict({memory.name: memory for memory in self.memories})
        self._hook()

    @property
    def model(self) -> nn.Module:
        return self.place.model

    @property
    def reads(self) -> dict[str, Read]:
        return self._passes.reads

    @property
    def enabled(self) -> bool:
        """False within :meth:`disabled`."""
        return self._passes.enabled

    @property
    def mixes(self) -> bool:
        """Are the model's logits log-probabilities of a mixture?"""
        return self.enabled and any(memory.mixes for memory in self.memories)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the memories, for an optimizer."""
        for memory in self.memories:
            yield from memory.parameters()

    def _hook(self) -> None:
        passes, place, handles = self._passes, self.place, self._handles
        # Before all others, and after: another's hook sees the pass as if the memory were a part of the model.
        handles.append(place.decoder.register_forward_pre_hook(passes.begin, with_kwargs=True, prepend=True))
        handles.append(place.decoder.register_forward_hook(passes.end, with_kwargs=True))
        for layer in sorted({layer for memory in self.memories for layer in memory.layers}):
            handles.append(place.blocks[layer].register_forward_hook(passes.after(layer), with_kwargs=True))
        for memory in self.memories:
            for part, module in memory.inputs(place).items():
                note = passes.note(f"{memory.name}.{part}")
                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            for layer, module in memory.replaced(place).items():
                self._forwards.append((module, vars(module).get("forward")))
                module.forward = passes.instead(memory, layer, module.forward)
            handles.extend(memory.hook(place, passes))
        if any(memory.mixes for memory in self.memories):
            handles.append(place.model.register_forward_pre_hook(passes.call, with_kwargs=True))
            handles.append(place.model.register_forward_hook(passes.mix, with_kwargs=True))

    def detach(self) -> None:
        """Take the memories away: the model has the parameters, hooks and outputs that it had before, to the bit.

        The memories keep what they learned, and can be attached again. Detaching twice does nothing.
        """
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        for module, forward in reversed(self._forwards):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._handles, self._forwards = [], []
        del self.place.model.mk_memory
        for memory in self.memories:
            memory.attached = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """In this block the model computes, to the bit, what it does without memories; nothing is read or written."""
        before, self._passes.enabled = self._passes.enabled, False
        try:
            yield
        finally:
            self._passes.enabled = before

    @contextlib.contextmanager
    def loss_only(self) -> Iterator[None]:
        """In this block a call with labels returns no logits where a memory mixes: the distribution over the
        vocabulary is then never written, and the loss costs one pass over the model's logits."""
        before, self._passes.loss_only = self._passes.loss_only, True
        try:
            yield
        finally:
            self._passes.loss_only = before

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the memories, and a fingerprint of the model, to ``folder`` (made if it is not there).

        ``memory.safetensors`` holds the parameters, ``memory.json`` the kinds, their options and the fingerprint; what
        else a memory has lies in a folder of its own. :func:`load` reads them.
        """
        save(self.place.model, self.memories, folder)

    def fit(self, data: Any, tokenizer: Any = None, **options: Any) -> list[float]:
        """Train the parameters of the memories alone, the model frozen: see :func:`fitting.fit`; the losses.

        A memory that is attached alone may have a way of its own, as :meth:`Neighbours.fit` has.
        """
        own = getattr(self.memories[0], "fit", None)
        if len(self.memories) == 1 and own is not None:
            return own(self, data, tokenizer, **options)
        return fit(self, data, tokenizer, **options)

    @torch.no_grad()
    def read_in(self, tokenizer: Any, text: Any, *, window: int = 512) -> int:
        """Let the memories keep a text, of any length: the model reads it in windows, without a cache.

        Args:
            tokenizer: of the model; None where ``text`` is token ids. text: str, or ids ``[T]`` or ``[1, T]``.
            window: tokens that the model reads at once.

        Returns:
            How many tokens were read.

        Raises:
            ValueError: no memory keeps a text, or the tokenizer is not that of the model. TypeError: ``text`` is a
                string and there is no tokenizer.
        """
        if not any(memory.reads_in for memory in self.memories):
            kinds = ", ".join(type(memory).__name__ for memory in self.memories)
            raise ValueError(f"read_in: a memory must keep a text (such as MemoryAttention), got {kinds}")
        ids = token_ids("read_in", self.place, text, tokenizer)[None]
        was, self._passes.reading = self._passes.reading, True
        training = self.place.model.training
        self.place.model.eval()
        try:
            for piece in ids.split(window, dim=1):
                self.place.decoder(input_ids=piece, attention_mask=torch.ones_like(piece), use_cache=False)
        finally:
            self._passes.reading = was
            self.place.model.train(training)
        return ids.shape[1]

    def trace(self, ids: Any, *, first: int = 1, most: int = 3) -> list[Traced]:
        """What the tokens of a text, such as one that was generated, owe to which records.

        The model reads the text once more, in one pass without a cache: so texts of beam search can be traced too. That
        pass is then the one of :attr:`reads`.

        Args:
            ids: int64 ``[T]`` or ``[1, T]``. first: number of the first token that is traced, from 1.
            most: records of each token.

        Returns:
            One :class:`Traced` for each of the tokens ``first .. T - 1``.

        Raises:
            ValueError: the ids are no text of at least 2 tokens, first lies outside 1..T-1, most is below 1, or no
                memory has records that vote (as Neighbours has).
        """
        from .trace import trace

        return trace(self, ids, first, most)

    def __repr__(self) -> str:
        kinds = ", ".join(type(memory).__name__ for memory in self.memories)
        return f"Attachment({kinds} in {type(self.place.model).__name__})"
