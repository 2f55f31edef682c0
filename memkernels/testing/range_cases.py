"""Cases of ops whose tokens have ranges of slots."""

from __future__ import annotations

from collections.abc import Mapping

from .case import Case
from .case import of_sizes as _sizes


def _ranged(name: str, kind: str = "", sizes: Mapping[str, int] | None = None, give=None, **rest) -> Case:
    """A case of an op whose tokens have ranges of slots, filled as ``kind`` says."""
    return Case(name, ("slot_range",), sizes or {}, give={"slot_range": kind, **(give or {})}, **rest)


RANGES = (
    _ranged("ranges", quick=True),
    _ranged("ranges, several blocks", sizes=_sizes(T=150, N=300), quick=True),
    _ranged("causal ranges", "ranges_causal", _sizes(T=200, N=200), quick=True),
    _ranged("causal ranges, more slots than tokens", "ranges_causal", _sizes(T=70, N=1000), tokens=(), memory=()),
    _ranged("windows", "ranges_window", _sizes(T=300, N=900, K=8, V=8), tokens=(), memory=()),
    _ranged("wide windows", "ranges_wide", _sizes(T=100, N=400, K=8, V=8), tokens=(), memory=()),
    _ranged("empty ranges", "ranges_empty", quick=True),
    _ranged("empty ranges, many tokens", "ranges_empty", _sizes(T=70, N=200)),
    _ranged("ranges of few tokens", sizes=_sizes(T=3, N=300), quick=True),
    _ranged("a range of many slots", "ranges_window", _sizes(T=1, N=4100), tokens=(), memory=()),
    _ranged("ranges, no slots", sizes=_sizes(N=0)),
    _ranged("ranges, no tokens", sizes=_sizes(T=0)),
    _ranged("ranges, shared memory", sizes=_sizes(T=40, N=200), tokens=(2, 3), memory=(3,), quick=True),
    _ranged("ranges shared by streams", sizes=_sizes(T=30, N=130), leads={"slot_range": ()}),
    _ranged("ranges, memory shared by few tokens", sizes=_sizes(T=2, N=130), tokens=(3,), memory=()),
    _ranged("ranges, float mask", give={"slot_mask": "mask_float"}),
    _ranged("ranges, empty slots", sizes=_sizes(T=70, N=300), give={"slot_mask": "mask_empty"}, quick=True),
    _ranged("ranges, sliced out of NaN", sizes=_sizes(T=20, N=130), layout="sliced"),
    _ranged("ranges, last dimension strided", layout="strided"),
    _ranged("ranges, expanded with stride 0", layout="expanded"),
    _ranged("ranges, odd widths", sizes=_sizes(T=70, N=200, K=7, V=9)),
    _ranged("ranges, content in float32", sizes=_sizes(T=70, N=200), mixed=True),
    Case(
        "ranges, sigmoid gate",
        ("slot_range", "sigmoid"),
        _sizes(T=70, N=200),
        give={"slot_range": "ranges", "slot_mask": "mask_empty"},
        params={"sigmoid": True},
    ),
    Case(
        "ranges, ties",
        ("slot_range", "k"),
        _sizes(T=40, N=300, K=4, k=9),
        give={"slot_range": "ranges", "query": "integers", "keys": "integers", "head_weights": "integers"},
        params={"scale": 1.0},
        exact=True,
    ),
    _ranged("ranges, NaN in one token", sizes=_sizes(T=40, N=130), give={"query": "nan_token"}),
    *(
        _ranged(
            f"ranges, NaN in {what} of some slots{many}",
            "ranges_middle",
            sizes,
            dict.fromkeys(names, "nan_slots"),
            quick=len(names) > 1 and many != "",
        )  # fmt: skip
        for what, names in (("keys and values", ("keys", "values")), ("values", ("values",)))
        for many, sizes in (("", _sizes(N=70)), (", many tokens", _sizes(T=150, N=300)))
    ),
)
