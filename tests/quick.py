"""The tests that ``make test-quick`` runs while code is changed, within two minutes on two cores."""

from __future__ import annotations

import textwrap
from pathlib import Path

from memkernels.testing import CASES

# Laws of implementations, errors, rules of the repository.
WHOLE = {
    "test_abi",
    "test_additive_laws",
    "test_cache_laws",
    "test_checker",
    "test_choice",
    "test_eager_paths",
    "test_errors",
    "test_habits",
    "test_house",
    "test_laws",
    "test_nn",
    "test_product_key_laws",
    "test_properties",
    "test_scan_laws",
    "test_softmax_write_laws",
    "test_sparse_write_laws",
    "test_weighted_write_laws",
    "test_write_laws",
}
CASE_NAMES = {case.name for case in CASES if case.quick}
DTYPES = ("float32", "bfloat16")
TRITON_CASE = "every size 3"


def wanted(item) -> bool:
    file = Path(item.path).stem
    if file == "test_grid":
        given = getattr(item, "callspec", None)
        if given is None or "case" not in given.params:
            return "scratch" not in item.name
        return given.params["case"] in CASE_NAMES and str(given.params["dtype"])[6:] in DTYPES
    if file == "test_triton":
        return item.name.startswith("test_the_contract_grid_in_the_interpreter")
    return file in WHOLE and item.get_closest_marker("slow") is None


def left_out() -> str:
    files = sorted({p.stem for p in Path(__file__).parent.glob("test_*.py")} - WHOLE - {"test_grid", "test_triton"})
    text = (
        f"Left out by --quick: of the grid all but {len(CASE_NAMES)} telling cases in {' and '.join(DTYPES)}; of the "
        f"Triton kernels all cases but '{TRITON_CASE}'; and {', '.join(name.removeprefix('test_') for name in files)}."
    )
    return textwrap.fill(text, 120)
