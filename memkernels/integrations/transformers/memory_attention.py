"""MemoryAttention: an attention layer that also reads keys and values of texts read before, by its own queries.

    m_th = sum_j softmax_j(scale * <q_th, k_(I_j)>) v_(I_j)      over the k best slots, of log-sum-exp M_th
    o_th = l_th + g_h (m_th - l_th),      g_h = tanh(b_h)                                  merge="gate"
    o_th = (exp(L_th) l_th + exp(M_th + b_h) m_th) / (exp(L_th) + exp(M_th + b_h))         merge="lse"

where ``l`` is what the model's own attention gives to the output projection of the layer, ``L`` its log-sum-exp. The
second is one softmax over the text at hand and the memory together.

Sources: Wu et al. 2022, Memorizing Transformers; Milakov and Gimelshein 2018, Online normalizer calculation for
softmax.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...ops import merge_reads, topk_read
from .attention import read_with_lse
from .memory import Memory, Step
from .place import Place

if TYPE_CHECKING:
    from .passes import Passes

_MERGES = ("gate", "lse")
_UNION = "memkernels_union"  # the name by which transformers finds the attention that merges by log-sum-exp
_UNIONS: WeakKeyDictionary[nn.Module, Callable[..., tuple[Tensor, None]]] = WeakKeyDictionary()


class MemoryAttention(Memory):
    """The keys and values of what was read stay in ``size`` slots of one layer, whose queries read the k best of them.

    ``merge="gate"``: ``o_th = l_th + g_h (m_th - l_th)`` with the model's own attention ``l``, the read ``m`` of the
    memory by the same queries, and a learned share ``g_h = tanh(b_h)`` of each head. Keys and queries are those before
    the rotation by positions: a slot is read as if it stood at the token's own place, however long ago it was written.

    ``merge="lse"``: one softmax over the keys of the text and the k best slots, to whose scores each head adds a
    learned ``b_h``, at first 0. A token for which the memory holds nothing similar takes little from it. The layer's
    attention is computed by :func:`memkernels.softmax_read`, which gives its log-sum-exp.

    :meth:`Attachment.read_in` fills the slots; the oldest go when there are more tokens than slots. All streams share
    them, and they are saved with the memory. While it is empty, the model is what it was; with ``merge="gate"`` also
    while ``gate`` is 0. The weights that :attr:`Attachment.reads` tells are those among the k slots, with
    ``merge="lse"`` those among all that the token attends to.

    Args:
        layer: the block; negative numbers count from the end. size: N, slots. k: slots that a query reads.
        gate: the initial share of the memory in each head, from 0 to below 1: 0 for a memory that is trained, a larger
            one to use what was read without training. 0 with ``merge="lse"``. merge: "gate" or "lse".

    Raises:
        ValueError: a size below 1, ``gate`` outside, another ``merge``; by ``attach``: a layer that the model has not.
            TypeError: by ``attach``: the projections of the block's attention are not known by their names; with
            ``merge="lse"`` also an attention that asks for its implementation in another way than Llama, GPT-2, Qwen3
            and Gemma3 do. NotImplementedError, in a pass: with ``merge="lse"``, the model caps its scores.

    Source: Wu et al. 2022, Memorizing Transformers; for ``merge="lse"`` also Milakov and Gimelshein 2018, Online
    normalizer calculation for softmax.
    """

    reads_in = True
    keys: Tensor
    values: Tensor
    written: Tensor
    gate: nn.Parameter
    bias: nn.Parameter

    def __init__(self, layer: int, size: int, k: int = 32, *, gate: float = 0.0, merge: str = "gate"):
        super().__init__((layer,), {"layer": layer, "size": size, "k": k, "gate": gate, "merge": merge})
        for name, number in (("size", size), ("k", k)):
            if number < 1:
                raise ValueError(f"MemoryAttention: {name} must be at least 1, got {number}")
        if not 0 <= gate < 1:
            raise ValueError(f"MemoryAttention: gate must lie in 0..1, below 1, got {gate}")
        if merge not in _MERGES:
            raise ValueError(f"MemoryAttention: merge must be one of {_MERGES}, got {merge!r}")
        if merge == "lse" and gate:
            raise ValueError(f"MemoryAttention: gate must be 0 with merge='lse', got {gate}")
        self.layer, self.size, self.k, self.merge = layer, size, k, merge
        self.heads = self.groups = self.head_dim = 0
        self.scale = 1.0
        self._now: dict[str, Tensor] = {}  # query, key and value of the pass under way
        self._slots: tuple[Tensor, Tensor] | None = None

    def build(self, place: Place) -> None:
        self.layer = self.layers[0]
        attention: Any = place.attention(self.layer)
        output = _projection(attention, "o_proj", "c_proj")
        if not (hasattr(attention, "c_attn") or all(hasattr(attention, n) for n in ("q_proj", "k_proj", "v_proj"))):
            kind = type(attention).__name__
            raise TypeError(f"MemoryAttention: the attention must have q_proj, k_proj, v_proj or c_attn, got a {kind}")
        config: Any = place.decoder.config
        if self.merge == "lse":
            _check_interface(attention)
        heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        self.heads = heads if kv is None else kv
        self.groups = heads // self.heads
        self.head_dim = attention.head_dim
        self.scale = getattr(attention, "scaling", self.head_dim**-0.5)
        made = place.factory(self.layer)
        dtype = next(p for p in output.parameters() if p.is_floating_point()).dtype
        start = torch.full((heads,), math.atanh(self.options["gate"]), **made)
        self.register_parameter("gate" if self.merge == "gate" else "bias", nn.Parameter(start))
        shape = (self.heads, 1, self.size, self.head_dim)  # the 1: of the queries that share a key
        self.register_buffer("keys", torch.zeros(shape, device=made["device"], dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, device=made["device"], dtype=dtype))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # tokens, all that there ever were

    def hook(self, place: Place, passes: Passes) -> list[Any]:
        attention: Any = place.attention(self.layer)
        handles = []
        if hasattr(attention, "c_attn"):
            handles.append(attention.c_attn.register_forward_hook(self._note_joint))
        else:
            for part, norm in (("q", "q_norm"), ("k", "k_norm"), ("v", None)):
                note = self._note(part, getattr(attention, norm, None) if norm else None)
                handles.append(getattr(attention, f"{part}_proj").register_forward_hook(note))
        if self.merge == "lse":
            return [*handles, *self._hook_union(attention, passes)]

        def merge(module: nn.Module, args: tuple) -> tuple | None:
            return (self._merged(args[0]), *args[1:]) if passes.enabled else None

        handles.append(_projection(attention, "o_proj", "c_proj").register_forward_pre_hook(merge))
        return handles

    def _hook_union(self, attention: nn.Module, passes: Passes) -> list[Any]:
        """For the time of a call the layer has a configuration of its own, which names our attention."""
        from transformers import AttentionInterface

        AttentionInterface.register(_UNION, _union)
        own: list[Any] = []

        def before(module: Any, args: tuple) -> None:
            self._slots = None
            if passes.enabled and self.filled:
                own.append(module.config)
                module.config = copy.copy(module.config)
                module.config._attn_implementation = _UNION
                _UNIONS[module] = self._read_union

        def after(module: Any, args: tuple, output: Any) -> None:
            if own:
                module.config = own.pop()
                del _UNIONS[module]

        return [
            attention.register_forward_pre_hook(before),
            attention.register_forward_hook(after, always_call=True),
        ]

    def _note(self, part: str, norm: Any) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = output.unflatten(-1, (-1, self.head_dim))  # [B, T, heads, K]
            self._now[part] = x if norm is None else norm(x)

        return hook

    def _note_joint(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        q, k, v = output.unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        self._now = {"q": q, "k": k, "v": v}

    @property
    def filled(self) -> int:
        """How many slots hold something."""
        return min(int(self.written), self.size)

    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The read of the memory ``[B, Hkv, G, T, K]``, its slots and weights ``[..., k]`` and its log-sum-exp."""
        query = self._now["q"].unflatten(-2, (self.heads, self.groups)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, T, K]
        return topk_read(
            query.to(self.keys.dtype),
            self.keys[..., : self.filled, :],
            self.values[..., : self.filled, :],
            self.k,
            scale=self.scale,
            return_slots=True,
            return_lse=True,
        )

    def _tell(self, slots: Tensor, weights: Tensor) -> None:
        """Keep what was read, ``[B, T, H, k]`` each, for :meth:`after_block`."""
        self._slots = tuple(x.detach().flatten(1, 2).transpose(1, 2) for x in (slots, weights))  # type: ignore[assignment]

    def _read_union(self, module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
        """What transformers calls for the attention of the layer: ``[B, T, H, K]`` of the text and the memory."""
        local, local_lse = read_with_lse(module, *args, **options)
        read, slots, weights, lse = self._read()
        lse = lse.to(local_lse.dtype) + self.bias.to(local_lse.dtype).view(self.heads, self.groups, 1)
        out, total = merge_reads([local, read.to(local.dtype)], [local_lse, lse])
        self._tell(slots, weights * (lse - total).exp().unsqueeze(-1))
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None

    def _merged(self, local: Tensor) -> Tensor:
        """The input ``[B, T, H * K]`` of the output projection, with what the memory gives."""
        self._slots = None
        if not self.filled:
            return local
        read, slots, weights, _ = self._read()
        self._tell(slots, weights)
        read = read.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, T, H, K]
        share = torch.tanh(self.gate).to(local.dtype).unsqueeze(-1)
        own = local.unflatten(-1, (-1, self.head_dim))
        return (own + share * (read.to(local.dtype) - own)).flatten(-2)

    def after_block(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        if self._slots is not None:
            step.record(self, layer, *self._slots)  # [B, T, H, k]
            self._slots = None
        return hidden

    def finish(self, step: Step) -> None:
        key, value = self._now.get("k"), self._now.get("v")
        self._now = {}
        if not step.reading or key is None or value is None:
            return
        real = torch.ones(key.shape[:2], dtype=torch.bool) if step.token_mask is None else step.token_mask
        with torch.no_grad():
            for rows, slots in ((key, self.keys), (value, self.values)):
                new = rows[real.to(rows.device)][-self.size :]  # [tokens, Hkv, K]
                count = int(real.sum())
                at = torch.arange(count - len(new), count, device=slots.device) + int(self.written)
                slots[:, 0, at % self.size] = new.transpose(0, 1).to(slots.dtype)
            self.written += count

    def forget(self) -> None:
        """Empty the memory; what was learned stays."""
        self.written.zero_()


def _union(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
    """The attention that transformers knows by the name; the layer tells which memory."""
    return _UNIONS[module](module, *args, **options)


def _check_interface(attention: nn.Module) -> None:
    """Refuse an attention that would not call what its configuration names."""
    module = sys.modules[type(attention).__module__]
    if not hasattr(module, "ALL_ATTENTION_FUNCTIONS") or not hasattr(attention, "config"):
        kind = type(attention).__name__
        raise TypeError(f"MemoryAttention: merge='lse' must have an attention of transformers' interface, got a {kind}")


def _projection(attention: Any, *names: str) -> nn.Module:
    for name in names:
        if isinstance(found := getattr(attention, name, None), nn.Module):
            return found
    kind = type(attention).__name__
    raise TypeError(
        f"MemoryAttention: the attention must have its output projection in .{', .'.join(names)}, got a {kind}"
    )
