"""Streaming: slots that every token writes and reads, beside the blocks of a pretrained model.

    y_t = x_t + W_o sum_i softmax_i(scale * <W_q n_t, k_i> + b_i) v_i,     n_t = rms_norm(x_t) * a

with values ``v_i`` that the tokens so far wrote by gates (:class:`memkernels.nn.StreamingMemory`). ``W_o`` starts at 0.

Source: Graves et al. 2014, Neural Turing Machines; Zhang et al. 2024, Gated Slot Attention.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...nn import MemoryState, StreamingMemory
from .memory import Memory, Step
from .place import Place


class Streaming(Memory):
    """A fixed number of slots after chosen blocks, into which every token writes, and which it reads.

    ``y_t = x_t + W_o sum_i softmax_i(scale * <W_q n_t, k_i> + b_i) v_i`` with ``n_t`` the normalised hidden state after
    the block; see :class:`memkernels.nn.StreamingMemory` for how tokens write. What a stream wrote rides in the model's
    cache: it reaches back to the beginning of the text, at the cost of its slots.

    Args:
        layers: blocks after which it stands; negative numbers count from the end.
        mem_size: N, slots per head. heads: H; divides the width of the model.
        read_first: a token reads before it writes.

    Raises:
        ValueError: by ``attach``: a layer that the model has not, heads that do not divide its width.

    Source: Graves et al. 2014, Neural Turing Machines; Zhang et al. 2024, Gated Slot Attention.
    """

    packed = False

    def __init__(self, layers: Sequence[int], mem_size: int, heads: int = 1, *, read_first: bool = False):
        sizes = {"mem_size": mem_size, "heads": heads, "read_first": read_first}
        super().__init__(layers, {"layers": list(layers), **sizes})
        self.parts = nn.ModuleDict()

    def build(self, place: Place) -> None:
        size, heads, first = (self.options[name] for name in ("mem_size", "heads", "read_first"))
        parts = {}
        for layer in self.layers:
            made = place.factory(layer)
            memory = StreamingMemory(place.width, size, heads=heads, read_first=first)
            self.zero_(memory.project_out)
            parts[str(layer)] = nn.ModuleDict({"norm": nn.RMSNorm(place.width), "memory": memory}).to(**made)
        self.parts = nn.ModuleDict(parts)

    def after_block(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        part = self.parts[str(layer)]
        memory: StreamingMemory = part["memory"]  # type: ignore[index]
        values = step.state(self, layer)
        state = None if values is None else MemoryState(values)
        x = part["norm"](hidden.to(memory.keys.dtype))  # type: ignore[index]
        read, state = memory(x, state, token_mask=step.token_mask)
        step.keep(self, layer, state.values)
        return hidden + read.to(hidden.dtype)
