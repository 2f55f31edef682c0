"""The cases of the contract grid, declared once for every op: an op takes each case whose ``needs`` it has.

Sizes, leading dimensions, values and memory layouts go by the name of an axis or argument, so a new op is covered as
soon as it is declared. ``inputs.py`` turns a case into tensors.
"""

from __future__ import annotations

from ..spec import Op
from .case import SIZES, UNMET, Case
from .case import of_sizes as _sizes
from .range_cases import RANGES
from .selected_cases import SELECTED

__all__ = ["CASES", "SIZES", "UNMET", "Case", "cases"]


def _every(n: int) -> dict[str, int]:
    return dict.fromkeys(SIZES, n)


SHAPES = (
    Case("usual", sizes=_sizes(T=16, N=64, K=32, V=32, k=8), tokens=(2, 3), memory=(2, 3), quick=True),
    Case("no leading dimensions", tokens=(), memory=()),
    Case("every size 1", sizes=_every(1), tokens=(), memory=()),
    Case("every size 3", sizes=_every(3), quick=True),
    Case("every size 63", sizes=_every(63) | {"k": 5, "S": 3}),
    Case("1000 tokens", ("T",), _sizes(T=1000, N=3, K=3, V=3, k=2), tokens=(), memory=()),
    Case("1000 slots", ("N",), _sizes(T=3, N=1000, K=8, V=8), tokens=(), memory=()),
    Case("no tokens", ("T",), _sizes(T=0)),
    Case("no slots", ("N",), _sizes(N=0)),
    Case("no streams", tokens=(0,), memory=(0,)),
    Case("more neighbours than slots", ("k", "N"), _sizes(N=6, k=10)),
    Case("many neighbours", ("k", "N"), _sizes(T=5, N=1000, k=128), tokens=(), memory=()),
    Case("one token, many slots", ("T", "N"), _sizes(T=1, N=4100, K=32, V=40, k=32), tokens=(), memory=(), quick=True),
    Case("8 tokens", ("T", "N"), _sizes(T=8, N=257, K=64, V=64, k=8)),
    Case(
        "65 tokens, just above a block", ("T", "N"), _sizes(T=65, N=257, K=24, V=40), tokens=(), memory=(), quick=True
    ),
    Case("several panels of tokens", ("T", "N"), _sizes(T=300, N=200), tokens=(4,), memory=(4,)),
    Case("slots just above many blocks", ("T", "N"), _sizes(T=17, N=4100, K=16, V=16), tokens=(), memory=()),
    Case("odd widths", sizes=_sizes(K=40, V=72, T=9, N=50)),
    Case("wide keys", ("K",), _sizes(K=320, V=40)),
    Case("wide values", ("V",), _sizes(K=40, V=264, T=9)),
    Case("key width 1", ("K",), _sizes(K=1)),
    Case("value width 1", ("V",), _sizes(V=1)),
    Case("many parts", ("S",), _sizes(S=17, T=5, V=8)),
    Case("more neighbours than pairs", ("subkeys",), _sizes(n=3, k=12)),
    Case(
        "more neighbours than subkeys", ("subkeys",), _sizes(T=70, n=17, h=12, k=40), tokens=(), memory=(), quick=True
    ),
    Case("many subkeys", ("subkeys",), _sizes(T=3, n=301, h=20, k=32)),
    Case("no subkeys", ("subkeys",), _sizes(n=0)),
    Case("a large vocabulary", ("W",), _sizes(T=3, W=5003, N=70)),
)

LEADS = (
    Case("memory shared by all", ("N",), tokens=(3,), memory=(), quick=True),
    Case("memory shared across the batch", ("N",), tokens=(2, 3), memory=(3,)),
    Case("memory shared, size 1", ("N",), tokens=(2, 3), memory=(1, 3)),
    Case("grouped heads", ("N",), tokens=(2, 2, 3), memory=(2, 2, 1)),
    Case("shared across a middle dimension", ("N",), tokens=(2, 3, 2), memory=(2, 1, 2), sizes=_sizes(T=5)),
    Case("tokens shared by memories", ("N",), tokens=(), memory=(3,)),
    Case("both sides broadcast", ("N",), tokens=(2, 1), memory=(1, 3)),
    Case("keys shared, mask per stream", ("keys", "slot_mask"), leads={"keys": ()}, give={"slot_mask": "mask_bool"}),
    Case("keys shared, values per stream", ("keys", "values"), leads={"keys": ()}),
    Case("keys per stream, values shared", ("keys", "values"), leads={"values": ()}),
    Case("mask broadcasts", ("slot_mask",), leads={"slot_mask": (1,)}, give={"slot_mask": "mask_float"}),
    Case("write shared", ("write",), leads={"write": ()}),
    Case("weight shared by streams", ("weight",), tokens=(2, 3), memory=()),
    Case("weight shared across the batch", ("weight",), tokens=(2, 3), memory=(3,), give={"initial": "normal"}),
    Case("initial shared", ("initial",), leads={"initial": ()}, give={"initial": "normal"}),
    Case(
        "initial per stream, inputs shared",
        ("initial",),
        tokens=(),
        leads={"initial": (3,)},
        memory=(),
        give={"initial": "normal"},
    ),
    Case("subkeys shared by streams", ("subkeys",), tokens=(2, 3), memory=(), quick=True),
    Case("subkeys shared across the batch", ("subkeys",), tokens=(2, 3), memory=(1, 3)),
    Case("query shared by subkeys", ("subkeys",), tokens=(), memory=(3,)),
    Case("subkeys shared, values per stream", ("subkeys", "values"), leads={"subkeys": ()}),
    Case("subkeys per stream, values shared", ("subkeys", "values"), leads={"values": ()}, quick=True),
    Case("score vector per stream", ("score_vector",), tokens=(2, 3), memory=(3,), leads={"score_vector": (2, 1)}),
    Case("cache shared by streams", ("cache_tokens",), leads={"cache_tokens": (), "cache_scores": (1,)}, quick=True),
    Case("logits shared by streams", ("cache_tokens",), leads={"logits": (), "mix": ()}),
    Case("shared memory, token mask", ("token_mask",), tokens=(3,), memory=(), give={"token_mask": "token_mask"}),
)

LAYOUTS = (
    Case("transposed", layout="transposed", quick=True),
    Case("sliced out of NaN", layout="sliced"),
    Case("last dimension strided", layout="strided"),
    Case("expanded with stride 0", layout="expanded"),
    Case("heads inside tokens", tokens=(2, 3), memory=(2, 3), layout="interleaved"),
)

MASKS = (
    Case("bool mask", ("slot_mask",), give={"slot_mask": "mask_bool"}, quick=True),
    Case("float mask", ("slot_mask",), give={"slot_mask": "mask_float"}, quick=True),
    Case("mask in the dtype of the query", ("slot_mask",), give={"slot_mask": "mask_lead"}),
    Case("mask stretched over slots", ("slot_mask",), give={"slot_mask": "mask_stretched"}),
    Case("poisoned empty slots", ("slot_mask",), _sizes(T=9, N=70, K=32), give={"slot_mask": "mask_empty"}, quick=True),
    Case("poisoned empty slots, bool", ("slot_mask",), _sizes(N=300), give={"slot_mask": "mask_bool_empty"}),
    Case("all slots empty", ("slot_mask",), give={"slot_mask": "mask_all_empty"}),
    Case("one stream empty", ("slot_mask",), give={"slot_mask": "mask_first_empty"}, quick=True),
    Case("fewer open slots than k", ("slot_mask", "k"), give={"slot_mask": "mask_two_open"}),
    Case(
        "large score offset",
        ("slot_mask", "query"),
        give={"slot_mask": "mask_offset", "query": "grid", "keys": "grid", "head_weights": "grid"},
        params={"scale": 0.25},
    ),
    Case("gates at infinity", ("values", "write", "slot_mask"), give={"slot_mask": "mask_infinite"}),
    Case("token mask", ("token_mask",), give={"token_mask": "token_mask"}, quick=True),
    Case("no token writes", ("token_mask",), give={"token_mask": "token_mask_none"}),
    Case("a part is empty", ("lses",), give={"lses": "lse_empty"}),
    Case("empty entries", ("cache_scores",), give={"cache_scores": "lse_empty"}, quick=True),
    Case("every entry empty", ("cache_scores",), give={"cache_scores": "lse_all_empty"}),
    Case("every token -1", ("cache_tokens",), give={"cache_tokens": "index_none"}),
    Case("every target -1", ("targets",), give={"targets": "index_none"}),
    Case("all parts are empty", ("lses",), give={"lses": "lse_all_empty"}),
)

VALUES = (
    Case("content in float32", ("mixed",), _sizes(T=9, N=70, K=32, V=32), mixed=True, quick=True),
    Case("content in float32, float mask", ("mixed", "slot_mask"), give={"slot_mask": "mask_float"}, mixed=True),
    Case("explicit scale", ("scale",), params={"scale": 0.7}),
    Case("negative scale", ("scale",), params={"scale": -0.3}),
    Case("scale 0", ("scale",), params={"scale": 0.0}),
    Case("sigmoid gate", ("sigmoid",), params={"sigmoid": True}, quick=True),
    Case("sigmoid gate, empty slots", ("sigmoid",), give={"slot_mask": "mask_empty"}, params={"sigmoid": True}),
    Case(
        "sigmoid gate, saturated",
        ("sigmoid",),
        _sizes(K=15),
        give={"query": "signs", "keys": "signs"},
        params={"sigmoid": True, "scale": 200.0},
    ),
    Case(  # not for a softmax: rounding scores of thousands decides how tied slots share the weight
        "gates at 0 and 1",
        ("gates",),
        _sizes(K=15),
        give={"query": "signs", "keys": "signs"},
        params={"scale": 200.0},
    ),
    Case("weights of 0 and 1", ("weights", "write"), give={"weights": "bits"}, quick=True),
    Case(
        "one slot takes all",
        ("scale", "query"),
        _sizes(K=15),
        give={"query": "signs", "keys": "signs", "subkeys": "signs"},
        params={"scale": 4.0},
    ),
    Case(
        "NaN in one token",
        ("T",),
        _sizes(T=9, N=70),
        give={"query": "nan_token", "weights": "nan_token", "reads": "nan_token", "logits": "nan_token"},
    ),
    Case("erase 0", ("erase_scale",), params={"erase_scale": 0.0}, quick=True),
    Case("erase 0.5", ("erase_scale",), params={"erase_scale": 0.5}),
    Case("erase tensor", ("erase",), give={"erase": "uniform"}, quick=True),
    Case(
        "erase tensor, both masks",
        ("erase", "slot_mask"),
        _sizes(T=19, N=70),
        give={"erase": "uniform", "slot_mask": "mask_empty", "token_mask": "token_mask"},
    ),
    Case(
        "erase tensor, token mask",
        ("erase", "token_mask"),
        _sizes(T=205, N=70),
        tokens=(),
        memory=(),
        give={"erase": "uniform", "token_mask": "token_mask"},
    ),
    Case(
        "several chunks of tokens, token mask", ("token_mask",), _sizes(T=205, N=70), give={"token_mask": "token_mask"}
    ),
    Case("erase tensor, shared memory", ("erase",), tokens=(2, 3), memory=(3,), give={"erase": "uniform"}),
    Case("erase tensor, float32 content", ("erase",), give={"erase": "uniform"}, mixed=True),
    Case(
        "ties",
        ("k", "query"),
        _sizes(T=20, N=300, K=4, k=16),
        give={"query": "integers", "keys": "integers", "subkeys": "integers", "head_weights": "integers"},
        params={"scale": 1.0},
        exact=True,
        quick=True,
    ),
    Case(
        "all scores equal",
        ("k", "query"),
        _sizes(T=5, N=1030, k=9),
        give={"keys": "zeros", "subkeys": "zeros"},
        exact=True,
    ),
    Case(
        "ties and empty slots",
        ("k", "query"),
        _sizes(T=9, N=70, K=4, k=16),
        params={"scale": 1.0},
        exact=True,
        give={
            "query": "integers",
            "keys": "integers",
            "subkeys": "integers",
            "head_weights": "integers",
            "slot_mask": "mask_bool",
        },
    ),
    Case(
        "scores ascend",
        ("k", "query"),
        _sizes(T=3, N=2000, K=1, k=12),
        tokens=(),
        memory=(),
        params={"scale": 1.0},
        give={"query": "ones", "keys": "ascending", "subkeys": "integers", "head_weights": "ones"},
        exact=True,
        wants=("keys", "subkeys"),
    ),
    Case("float8 keys and values", ("key_scale",), give={"keys": "float8", "values": "float8"}, quick=True),
    Case("float8 values", ("indices", "value_scale"), give={"values": "float8"}, quick=True),
    Case("float8 values of pairs", ("subkeys", "value_scale"), give={"values": "float8"}, quick=True),
    Case("compressed keys beside float values", ("key_scale", "value_scale"), give={"values": "normal"}),
    Case("float keys beside compressed values", ("key_scale", "value_scale"), give={"keys": "normal"}),
    Case("initial state", ("initial",), give={"initial": "normal"}, quick=True),
    Case("initial state, no tokens", ("initial",), _sizes(T=0), give={"initial": "normal"}),
    Case("initial state in float32", ("initial", "mixed"), give={"initial": "normal"}, mixed=True),
    Case("many tokens, few channels", ("D",), _sizes(T=3000, D=5), tokens=(), memory=(), give={"initial": "normal"}),
    Case("many channels", ("D",), _sizes(T=40, D=300), give={"initial": "normal"}),
    Case("many streams", ("D",), _sizes(T=11, D=17), tokens=(29,), memory=(), give={"initial": "normal"}),
    Case("gates of 0 and 1", ("forget",), _sizes(T=700), give={"forget": "bits", "initial": "normal"}),
    Case("read first", ("read_first",), params={"read_first": True}, quick=True),
    Case(
        "read first, shared memory, both masks",
        ("read_first",),
        _sizes(T=19, N=70),
        tokens=(2, 3),
        memory=(3,),
        give={"slot_mask": "mask_empty", "token_mask": "token_mask"},
        params={"read_first": True},
    ),
    Case(
        "NaN in one write",
        ("read_first",),
        _sizes(T=9, N=70),
        give={"read_query": "nan_token", "write": "nan_token"},
    ),
    Case(
        "many equal pairs",
        ("subkeys",),
        _sizes(T=20, n=23, h=3, k=60),
        give={"query": "integers", "subkeys": "integers"},
        params={"scale": 1.0},
        exact=True,
        quick=True,
    ),
    Case("mix 0", ("mix",), give={"mix": "zeros"}, quick=True),
    Case("mix 1", ("mix",), give={"mix": "ones"}, quick=True),
    Case("mix 0 and 1", ("mix",), give={"mix": "bits", "cache_scores": "lse_empty"}),
    Case(
        "one word in the whole cache", ("cache_tokens",), give={"cache_tokens": "index_same", "targets": "index_same"}
    ),
    Case("pages of several blocks", ("pages",), _sizes(T=70, F=7, S=130), tokens=(), memory=(), quick=True),
    Case(
        "many pages", ("pages",), _sizes(T=3, F=40, S=128, k=32), tokens=(), memory=(), give={"slot_mask": "mask_bool"}
    ),
    Case("no frames", ("pages",), _sizes(F=0), give={"best_scores": "stats", "best_slots": "slots_beyond"}),
    Case("frames shared, pages per stream", ("pages",), leads={"keys": ()}, give={"slot_mask": "mask_bool"}),
    Case(
        "best of an earlier search",
        ("pages",),
        _sizes(T=70, F=9, S=50, k=9),
        give={"best_scores": "stats", "best_slots": "slots_beyond"},
        quick=True,
    ),
    Case(
        "best of an earlier search, few tokens",
        ("pages",),
        _sizes(T=2, F=40, S=128, k=70),
        tokens=(),
        memory=(),
        give={"best_scores": "lse_empty", "best_slots": "slots_beyond", "slot_mask": "mask_two_open"},
    ),
    Case(
        "ties across pages and with an earlier search",
        ("pages",),
        _sizes(T=20, F=12, S=40, K=3, k=30),
        give={"query": "integers", "keys": "integers", "best_scores": "integers", "best_slots": "slots_beyond"},
        params={"scale": 1.0},
        exact=True,
        quick=True,
    ),
    Case("every index -1", ("indices", "T", "N"), give={"indices": "index_none"}),
    Case(
        "every index the same",
        ("indices", "T", "N"),
        _sizes(T=40, k=7),
        give={"indices": "index_same"},
        quick=True,
    ),
)

LOOKUP = (
    Case("int8 rows", ("values", "block"), _sizes(k=70, C=1), give={"values": "int8", "value_scale": ""}, quick=True),
    Case("float8 rows", ("values", "block"), _sizes(k=70, C=1), give={"values": "float8", "value_scale": ""}),
    Case(
        "float8 rows in blocks of 32, powers of two",
        ("values", "block"),
        _sizes(V=256, C=8, k=24),
        give={"values": "float8", "value_scale": "power_of_two"},
        quick=True,
    ),
    Case(
        "int8 rows in short blocks",
        ("values", "block"),
        _sizes(V=71, C=15),
        params={"block": 5},
        give={"values": "int8", "value_scale": ""},
    ),
    Case(
        "blocks that end within the row",
        ("values", "block"),
        _sizes(V=100, C=2),
        params={"block": 64},
        give={"values": "int8", "value_scale": "power_of_two"},
    ),
    Case("many rows", ("values", "block"), _sizes(V=64, k=9000), tokens=(), quick=True),
    Case("rows named often", ("values", "block"), _sizes(V=33, N=3, k=500)),
    Case("every row -1", ("values", "block"), give={"indices": "index_none"}),
    Case("token map", ("token_map",), give={"token_map": ""}, quick=True),
    Case("history", ("history",), give={"history": ""}, quick=True),
    Case("packed sequences", ("first",), _sizes(T=40), give={"first": ""}, quick=True),
    Case("ignored tokens", ("ignore",), _sizes(I=9), give={"ignore": ""}, quick=True),
    Case(
        "map, history, packed and ignored",
        ("first",),
        _sizes(T=700, M=8, J=5, P=4),
        tokens=(2, 3),
        leads={"first": (3,)},
        params={"orders": [2, 5], "heads": 4, "pad": -7},
        give={"token_map": "", "history": "", "first": "", "ignore": ""},
        quick=True,
    ),
    Case("history shared by streams", ("history",), tokens=(2, 3), leads={"history": (3,)}, give={"history": ""}),
    Case("orders in any order", ("orders",), _sizes(M=6, J=4), params={"orders": [4, 1, 2], "heads": 2}),
    Case("history of single tokens", ("history",), _sizes(T=1), tokens=(300,), give={"history": ""}),
    Case("plain gate", ("signed_sqrt",), params={"signed_sqrt": False}, quick=True),
    Case("wide gate", ("signed_sqrt",), _sizes(B=2, D=1300), tokens=(5,), quick=True),
    Case("many gates", ("signed_sqrt",), _sizes(B=1, D=96), tokens=(1500,)),
    Case("hidden state of zeros", ("signed_sqrt",), give={"hidden": "zeros"}),
    Case("opposite key", ("signed_sqrt",), give={"hidden": "ones", "key": "ones", "hidden_weight": "signs"}),
    Case("NaN in one hidden state", ("signed_sqrt",), tokens=(2, 4), give={"hidden": "nan_token"}),
    Case("hidden shared by streams", ("signed_sqrt",), tokens=(3, 4), leads={"hidden": (), "value": (1,)}, quick=True),
    Case("value shared by streams", ("signed_sqrt",), tokens=(3, 4), leads={"value": (4,), "key": (3, 1)}),
)

GRADIENTS = (
    Case("gradient of the hidden state only", ("signed_sqrt",), wants=("hidden",)),
    Case("gradient of the value only", ("signed_sqrt",), wants=("value",)),
    Case("gradient of the gate's weights only", ("signed_sqrt",), wants=("hidden_weight", "key_weight")),
    Case("gradient of the query only", ("query",), wants=("query",)),
    Case("gradient of the keys only", ("keys",), wants=("keys",)),
    Case("gradient of the values only", ("values",), wants=("values",)),
    Case("gradient of the weights only", ("weights",), wants=("weights",)),
    Case("gradient of the mask only", ("slot_mask",), give={"slot_mask": "mask_float"}, wants=("slot_mask",)),
    Case("gradient of the write only", ("write",), wants=("write",)),
    Case("gradient of the erase only", ("erase",), give={"erase": "uniform"}, wants=("erase",)),
    Case("gradient through the read only", ("-> read",), cotangents=("read",)),
    Case("gradient through lse only", ("-> read", "-> lse"), cotangents=("lse",)),
    Case("gradient through the weights only", ("-> read", "-> weights"), cotangents=("weights",)),
    Case("gradient of the update only", ("update",), wants=("update",)),
    Case("gradient of the initial state only", ("initial",), give={"initial": "normal"}, wants=("initial",)),
    Case("gradient of the weight only", ("weight",), wants=("weight",)),
    Case("gradient of the read query only", ("read_query",), wants=("read_query",)),
    Case("gradient of the write query only", ("write_query",), wants=("write_query",)),
    Case("gradient through the reads only", ("read_first",), cotangents=("reads",)),
    Case("gradient through the new values only", ("read_first",), cotangents=("values",)),
    Case("gradient through the values only", ("-> retained",), cotangents=("values",)),
    Case("gradient of the subkeys only", ("subkeys",), wants=("subkeys",)),
    Case("gradient of the score vector only", ("score_vector",), wants=("score_vector",)),
    Case("gradient of the logits only", ("logits",), wants=("logits",)),
    Case("gradient of the cache scores only", ("cache_scores",), wants=("cache_scores",)),
    Case("gradient of the mix only", ("mix",), wants=("mix",)),
    Case("gradient through retained only", ("-> retained",), cotangents=("retained",)),
)


CASES = (*SHAPES, *LEADS, *LAYOUTS, *MASKS, *VALUES, *RANGES, *SELECTED, *LOOKUP, *GRADIENTS)


def cases(op: Op, *, quick: bool = False) -> list[Case]:
    """The cases that ``op`` takes; ``quick``: only those that find most mistakes."""
    return [case for case in CASES if case.fits(op) and (case.quick or not quick)]
