"""Cases of ops on slots that tokens name, and of scores that are summed over heads."""

from __future__ import annotations

from .case import Case
from .case import of_sizes as _sizes

SELECTED = (
    Case("few slots, each named by many", ("indices", "query"), _sizes(T=300, N=5, k=9)),
    Case(
        "many named slots", ("indices", "query"), _sizes(T=3, N=50, k=129), give={"slot_mask": "mask_float"}, quick=True
    ),
    Case("named slots, some empty", ("indices", "slot_mask"), _sizes(N=9, k=20), give={"slot_mask": "mask_empty"}),
    Case("indices shared by heads", ("indices", "query"), tokens=(2, 3), memory=(2, 1), leads={"indices": (2, 1)}),
    Case("indices shared by streams", ("indices", "query"), tokens=(2, 3), memory=(3,), leads={"indices": ()}),
    Case("indices per memory", ("indices", "query"), tokens=(), memory=(3,), leads={"indices": (3,)}, quick=True),
    Case(
        "many heads, few tokens",
        ("head_weights",),
        _sizes(T=3, H=33, N=300, K=24),
        give={"slot_mask": "mask_empty"},
        quick=True,
    ),
    Case("many heads", ("head_weights",), _sizes(T=70, H=17, N=200, K=8), give={"slot_mask": "mask_float"}),
    Case("no heads", ("head_weights",), _sizes(H=0)),
    Case("weights of heads shared by streams", ("head_weights",), leads={"head_weights": ()}, quick=True),
    Case("zero weights of heads", ("head_weights",), _sizes(N=300), give={"head_weights": "zeros"}, exact=True),
    Case("gradient of the head weights only", ("head_weights",), wants=("head_weights",)),
)
