"""Memory: what can be attached to a pretrained model, and Step: one forward pass, as memories see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .place import Place

if TYPE_CHECKING:
    from .passes import Passes


class Mixture(NamedTuple):
    """What a memory adds to the model's distribution over the next token, for the S positions that have logits.

    ``p(w) = (1 - mix) softmax(logits)[w] + mix * sum_{j: token_j = w} softmax_j(scores)``

    scores: ``[B, S, k]``, -inf where there is no entry. tokens: int64 ``[B, S, k]``, -1 where there is no entry.
    mix: ``[B, S]``. All are those of :func:`memkernels.cache_logprobs` and :func:`memkernels.cache_nll`.
    """

    scores: Tensor
    tokens: Tensor
    mix: Tensor


def no_entries(logits: Tensor) -> Mixture:
    """The mixture without entries: the model's own distribution."""
    none = logits.new_empty(*logits.shape[:-1], 0)
    mix = logits.new_zeros(none.shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32))
    return Mixture(none, none.long(), mix)


class Read(NamedTuple):
    """What tokens read: the slots ``[B, T, ..., k]`` (-1: none) and their weights, of the same shape."""

    slots: Tensor
    weights: Tensor


class Vote(NamedTuple):
    """One record that a token read. weight: its share of the distribution over the next token. agrees: is the token
    that it votes for the one that came? source: where it stands, None where it was removed."""

    weight: float
    agrees: bool
    source: Any


class Votes(NamedTuple):
    """What the records gave to one token. probability: of that token, from all records. share: of all tokens. best:
    the records of the largest weight."""

    probability: float
    share: float
    best: list[Vote]


class Step:
    """One forward pass of the model: its tokens, what earlier tokens left, and what this pass leaves to later ones.

    Attributes:
        input_ids: int64 ``[B, T]``; None where the model was given embeddings.
        token_mask: bool ``[B, T]``, False for padding; None where every token is real.
        labels: int64 ``[B, T]`` of the causal language model's call, or None.
        cache: the model's cache, or None. Where there is none, states are dropped at the end.
        hidden: ``[B, T, width]``, what the decoder returned; set when :meth:`Memory.finish` is called.
        reading: the pass belongs to :meth:`Attachment.read_in`, whose text is to be kept.
    """

    def __init__(self, input_ids: Tensor | None, token_mask: Tensor | None, cache: Any, old: dict[str, Any]):
        self.input_ids, self.token_mask, self.cache = input_ids, token_mask, cache
        self.labels: Tensor | None = None
        self.logits_to_keep: int | Tensor = 0
        self.hidden: Tensor | None = None
        self.reading = False
        self.old, self.new = old, {}  # type: tuple[dict[str, Any], dict[str, Any]]
        self.inputs: dict[str, Tensor] = {}
        self.started: dict[str, Any] = {}  # by Memory.begin
        self.reads: dict[str, Read] = {}

    def state(self, memory: Memory, part: str | int = "") -> Any | None:
        """What the pass before this one kept under this name; None at the beginning of a text."""
        return self.old.get(f"{memory.name}.{part}")

    def keep(self, memory: Memory, part: str | int, state: Any) -> None:
        """Hand on a tensor or a (named) tuple of tensors ``[B, ...]``; committed when the decoder is done."""
        self.new[f"{memory.name}.{part}"] = state

    def input_of(self, memory: Memory, part: str | int) -> Tensor:
        """The input of a module that :meth:`Memory.inputs` named."""
        return self.inputs[f"{memory.name}.{part}"]

    def with_logits(self, x: Tensor) -> Tensor:
        """The rows ``[B, S, ...]`` of ``x`` ``[B, T, ...]`` that get logits (``logits_to_keep``)."""
        keep = self.logits_to_keep
        if isinstance(keep, Tensor):
            return x[:, keep]
        return x[:, x.shape[1] - keep :] if keep else x

    def record(self, memory: Memory, part: str | int, slots: Tensor, weights: Tensor) -> None:
        """Tell what was read, for :attr:`Attachment.reads`."""
        self.reads[f"{memory.name}.{part}"] = Read(slots.detach(), weights.detach())


class Memory(nn.Module):
    """The base of what :func:`attach` gives to a model. A subclass overrides what it needs of the methods below.

    A memory is made with its options alone. ``attach`` calls :meth:`build` once, which makes its parameters for the
    model at hand, or refuses by raising: then nothing has been attached. In a forward pass of the model these are
    called, in this order:

    0. :meth:`begin`, before the decoder: the place to prefetch what the tokens name.
    1. :meth:`after_block`, after each block that :attr:`layers` names: returns the hidden states that go on.
       :meth:`replace`, in the place of each module that :meth:`replaced` names.
       The inputs of modules that :meth:`inputs` names are noted: :meth:`Step.input_of` gives them later.
    2. :meth:`finish`, once, when the decoder is done: the place to write what the pass taught. Then what
       :meth:`Step.keep` was given is committed to the cache.
    3. :meth:`mixture`, if :attr:`mixes`, when the causal language model has its logits, after any scaling and capping.
       The logits become log-probabilities of the mixture; the loss is computed anew where there are labels.

    The first two may run a second time when gradient checkpointing replays a block: they read the step, keep and record
    in it, and change nothing else. A replay inside a block has no step (``replace`` never gets one).

    A state that the step keeps has the batch as its leading dimension. The cache reorders, repeats, selects and resets
    it with the model's keys and values; :meth:`crop` is asked when the last tokens are to be removed.

    Attributes:
        name: of the memory in its attachment, a part of the names in ``state_dict`` (set by ``attach``).
        layers: numbers of the blocks after which it is called; :meth:`build` replaces negative ones.
        mixes: does it change the model's distribution over tokens?
        reads_in: does :meth:`finish` keep what ``step.reading`` tells it to?
        options: JSON of the arguments by which :func:`load` makes it again: ``Kind(**options)``.
        tokenizer: what :meth:`Attachment.fit` encodes texts with where it is given none.
        packed: may several texts lie in one row, told apart by ``position_ids`` alone? Otherwise they are refused.
        attached: is it at work in a model? (set by ``attach``)
    """

    kinds: ClassVar[dict[str, type[Memory]]] = {}
    mixes: bool = False
    reads_in: bool = False
    packed: bool = True

    def __init__(self, layers: Sequence[int] = (), options: dict[str, Any] | None = None):
        super().__init__()
        self.name, self.attached = "", False
        self._built: tuple[int, int] | None = None  # width and number of blocks of the model
        self.layers = tuple(layers)
        self.options: dict[str, Any] = dict(options or {})
        self.tokenizer: Any = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Memory.kinds[cls.__name__] = cls

    def build_once(self, place: Place) -> None:
        """:meth:`build`, unless that was done for a model of this size.

        Raises:
            ValueError: it was done for a model of another size. What :meth:`build` raises.
        """
        size = (place.width, len(place.blocks))
        if self._built is None:
            self.layers = tuple(place.layer(type(self).__name__, layer) for layer in self.layers)
            self.build(place)
            self._built = size
        elif self._built != size:
            name = type(self).__name__
            raise ValueError(f"{name}: the model must have width and blocks {self._built} as at first, got {size}")

    def build(self, place: Place) -> None:
        """Make the parameters, beside the blocks of ``place``; called once, before anything is attached.

        Raises:
            ValueError, TypeError: the memory does not fit the model.
        """

    def inputs(self, place: Place) -> dict[str, nn.Module]:
        """Modules of the model whose first input is wanted, by a name for :meth:`Step.input_of`."""
        return {}

    def replaced(self, place: Place) -> dict[int, nn.Module]:
        """Modules of the model in whose place :meth:`replace` is called, by the number of their block."""
        return {}

    def hook(self, place: Place, passes: Passes) -> list[Any]:
        """Further hooks on modules of the model, for what the methods here cannot do: their handles."""
        return []

    def begin(self, step: Step) -> None:
        """The decoder is about to begin; ``step.started`` takes what is under way from here."""

    def after_block(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        """The hidden states ``[B, T, width]`` that go on from block ``layer``, in the dtype that was given."""
        return hidden

    def replace(self, layer: int, x: Tensor) -> Tensor:
        """The output of the module that is replaced in block ``layer``, for its input."""
        raise NotImplementedError(f"{type(self).__name__}: replace must be defined where replaced() names a module")

    def finish(self, step: Step) -> None:
        """The decoder is done. Runs once for a pass, also under gradient checkpointing."""

    def mixture(self, step: Step, logits: Tensor) -> Mixture | None:
        """What to mix into the distribution of ``logits`` ``[B, S, W]``; None: nothing. Only if :attr:`mixes`."""
        return None

    def votes(self, reads: Mapping[str, Read], ids: Tensor, first: int, most: int) -> list[Votes] | None:
        """Which records voted for the tokens ``ids[first:]`` of a text ``ids [T]``; None: this memory has no records.

        Args:
            reads: of :attr:`Attachment.reads`, of all tokens of the text. most: records of each token.
        """
        return None

    def crop(self, state: Any, tokens: int) -> Any:
        """One of the states of this memory without what its last ``tokens`` tokens added.

        Raises:
            NotImplementedError: what they wrote cannot be undone; assisted generation is then refused.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: crop must undo what tokens wrote, which this memory cannot: "
            "generate without an assistant model or prompt lookup"
        )

    def save_parts(self, folder: Path) -> None:
        """Write to ``folder``, which is its own, what neither ``state_dict`` nor :attr:`options` holds."""

    def load_parts(self, folder: Path) -> None:
        """Read what :meth:`save_parts` wrote; called after :meth:`build`."""

    def zero_(self, *projections: nn.Linear) -> None:
        """Start output projections at zero, so that an attached memory changes nothing until it is trained."""
        for projection in projections:
            torch.nn.init.zeros_(projection.weight)
