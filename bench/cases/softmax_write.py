"""softmax_write: weights that each of T tokens shares out among N slots, added to what they hold or interpolated."""

from __future__ import annotations

from ..case import Case, cost, ratio
from .gated_write import backward_bytes, forward_bytes, make

forward_flops = cost("softmax_write")
backward_flops = cost("softmax_write", "backward")


def _case(direction, *goals):
    forward = direction == "forward"
    return Case(
        op="softmax_write",
        sizes={"T": 512, "N": 4096, "K": 64, "V": 64},
        quick={"T": 128, "N": 1024, "K": 64, "V": 64},
        make=make,
        flops=forward_flops if forward else backward_flops,
        bytes=forward_bytes if forward else backward_bytes,
        direction=direction,
        grads=() if forward else ("values", "keys", "query", "write"),
        goals=goals,
    )


CASES = [_case("forward"), _case("backward", ratio(3, "eager"))]
