"""ProductKeys: a table of n * n values that keys in pairs address, beside a block of a pretrained model or in it.

    q_th = layer_norm(W_h n_t),      p, I = softmax, indices of the k best of <q_th, [s_h1i, s_h2j]> * K^-1/2
    y_t  = x_t + W_o (silu(W_g n_t) * sum_h sum_j p_thj v_(I_thj)),        n_t = rms_norm(x_t) * a

Sources: Lample et al. 2019, Large Memory Layers with Product Keys; Berges et al. 2024, Memory Layers at Scale (gate).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import product_key_read
from .memory import Memory, Step
from .place import Place

_MODES = ("add", "replace")


class ProductKeyLayer(nn.Module):
    """One layer: ``x [B, T, width]`` to ``(y, slots [B, H, T, k], weights)``; ``y`` without the residual."""

    def __init__(self, width: int, n: int, heads: int, k: int, key_dim: int, sparse_grad: bool):
        super().__init__()
        self.heads, self.k, self.sparse_grad = heads, k, sparse_grad
        self.norm = nn.RMSNorm(width)
        self.project_query = nn.Linear(width, heads * key_dim)
        self.norm_query = nn.LayerNorm(key_dim)
        self.subkeys = nn.Parameter(torch.randn(heads, 2, n, key_dim // 2))
        self.values = nn.Parameter(torch.randn(n * n, width) * width**-0.5)
        self.project_gate = nn.Linear(width, width)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x.to(self.values.dtype))
        query = self.norm_query(self.project_query(x).unflatten(-1, (self.heads, -1))).transpose(-3, -2)  # [B, H, T, K]
        query = query.to(self.subkeys.dtype)
        read, slots, weights = product_key_read(
            query, self.subkeys, self.values, self.k, return_slots=True, sparse_grad=self.sparse_grad
        )
        return self.project_out(F.silu(self.project_gate(x)) * read.sum(-3)), slots, weights


class ProductKeys(Memory):
    """Tables of ``n * n`` learned values at chosen blocks, of which each token reads ``heads * k``.

    ``y_t = x_t + W_o (silu(W_g n_t) * sum_h sum_j p_thj v_(I_thj))`` with the k best slots of each head over all pairs
    of two lists of n half keys. The number of parameters grows with ``n * n``, the work of a token with n.

    Args:
        layers: blocks; negative numbers count from the end. n: half keys in each list. heads: H. k: slots per head.
        mode: "add": after the block, ``W_o`` starting at zero. "replace": in the place of the block's feed-forward
            network, which is not computed any more; this changes the model at once, until the memory is trained.
        key_dim: K, of a query; default: about ``width / heads``. sparse_grad: the gradient of the values is a sparse
            tensor of the rows that were read, for :class:`memkernels.optim.SparseAdam`.

    Raises:
        ValueError: another mode, an odd ``key_dim``, a size below 1; by ``attach``: a layer that the model has not.
            TypeError: by ``attach``: "replace", and the block's feed-forward network is not known by its name.

    Source: Lample et al. 2019, Large Memory Layers with Product Keys; Berges et al. 2024, Memory Layers at Scale.
    """

    def __init__(
        self,
        layers: Sequence[int],
        n: int,
        heads: int = 4,
        k: int = 16,
        mode: str = "add",
        *,
        key_dim: int | None = None,
        sparse_grad: bool = False,
    ):
        sizes = {"n": n, "heads": heads, "k": k, "mode": mode, "key_dim": key_dim, "sparse_grad": sparse_grad}
        super().__init__(layers, {"layers": list(layers), **sizes})
        if mode not in _MODES:
            raise ValueError(f"ProductKeys: mode must be one of {_MODES}, got {mode!r}")
        for name, size in {"n": n, "heads": heads, "k": k, "key_dim": 2 if key_dim is None else key_dim}.items():
            if size < 1 or (name == "key_dim" and size % 2):
                raise ValueError(f"ProductKeys: {name} must be {'even' if size > 0 else 'at least 1'}, got {size}")
        self.mode, self.blocks = mode, self.layers
        self.parts = nn.ModuleDict()

    def build(self, place: Place) -> None:
        n, heads, k, sparse_grad = (self.options[name] for name in ("n", "heads", "k", "sparse_grad"))
        key_dim = self.options["key_dim"] or max(2, place.width // heads // 2 * 2)
        self.blocks = self.layers
        if self.mode == "replace":
            for layer in self.blocks:
                place.feed_forward(layer)
            self.layers = ()  # of blocks after which it is called: none
        parts = {}
        for layer in self.blocks:
            part = ProductKeyLayer(place.width, n, heads, k, key_dim, sparse_grad)
            if self.mode == "add":
                self.zero_(part.project_out)
            parts[str(layer)] = part.to(**place.factory(layer))
        self.parts = nn.ModuleDict(parts)

    def replaced(self, place: Place) -> dict[int, nn.Module]:
        return {layer: place.feed_forward(layer) for layer in self.blocks} if self.mode == "replace" else {}

    def after_block(self, layer: int, hidden: Tensor, step: Step) -> Tensor:
        y, slots, weights = self.parts[str(layer)](hidden)
        step.record(self, layer, slots.transpose(1, 2), weights.transpose(1, 2))  # [B, T, H, k]
        return hidden + y.to(hidden.dtype)

    def replace(self, layer: int, x: Tensor) -> Tensor:
        return self.parts[str(layer)](x)[0].to(x.dtype)
