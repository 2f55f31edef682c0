"""Replacement of slots: the use by its equations, the order of the least used, forgetting by time."""

from __future__ import annotations

import pytest
import torch
from support import close, randn
from torch.nn import functional as F

import memkernels as mk
from memkernels.nn import SlotUse, fade, least_recently_used, least_used, replace_slots

B, N, T, K = 2, 5, 3, 4


def use_of(reads, writes=None, last_used=None, tokens=9) -> SlotUse:
    reads = torch.tensor(reads)
    writes = torch.zeros_like(reads) if writes is None else torch.tensor(writes)
    last_used = torch.full(reads.shape, -1) if last_used is None else torch.tensor(last_used)
    return SlotUse(reads, writes, last_used, torch.tensor(tokens))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_use_is_counted_as_the_tokens_read_and_wrote(backend):
    query, keys, values, write = randn(B, T, K), randn(B, N, K), randn(B, N, K, seed=1), randn(B, T, K, seed=1)
    decay, use = 0.9, SlotUse.none(B, N)
    reads, writes, last = torch.zeros(B, N), torch.zeros(B, N), torch.full((B, N), -1)
    for call in range(3):
        q = query * (call + 1)
        lse = mk.softmax_read(q, keys, values, return_lse=True, backend=backend)[1]
        use = use.after_read(mk.slot_usage(q, keys, lse, backend=backend), T, decay=decay, threshold=0.5)
        retained = mk.gated_write(values, keys, q, write, return_retained=True, backend=backend)[1]
        use = use.after_write(retained, 0, decay=decay, threshold=2.0)
        scores = q @ keys.mT * K**-0.5
        usage = torch.softmax(scores, -1).sum(-2)
        reads, writes = reads * decay**T + usage, writes * decay**T + 1 - torch.sigmoid(-scores).prod(-2)
        last[usage >= 0.5] = T * (call + 1)
        close(use.reads, reads)
        close(use.writes, writes)
        assert torch.equal(use.last_used, last)
        assert (usage < 0.5).any() and (usage >= 0.5).any()
    assert use.tokens == 3 * T


def test_use_carries_no_gradient():
    usage = torch.rand(N, requires_grad=True)
    use = SlotUse.none(N).after_read(usage, 1).after_write(usage, 1)
    assert not use.reads.requires_grad and not use.writes.requires_grad


def test_the_least_used_come_first():
    use = use_of([[3.0, 0.5, 2.0, 0.0, 1.0]], [[0.0, 0.0, 0.0, 0.75, 0.0]])
    assert least_used(use, 5).tolist() == [[1, 3, 4, 2, 0]]
    assert least_used(use, 2).tolist() == [[1, 3]]
    assert least_used(use, 0).shape == (1, 0)
    keep = torch.tensor([[False, True, True, False, True]])
    assert least_used(use, 3, keep=keep).tolist() == [[3, 0, -1]]


def test_the_least_recently_used_come_first():
    use = use_of([9.0] * 5, last_used=[7, 2, -1, 2, -1])
    assert least_recently_used(use, 5).tolist() == [2, 4, 1, 3, 0]
    assert least_recently_used(use, 4, keep=torch.tensor([True, False, True, False, False])).tolist() == [4, 1, 3, -1]
    used = use.after_read(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]), 1)
    assert least_recently_used(used, 5).tolist() == [2, 1, 3, 0, 4]


def test_a_replaced_slot_is_new():
    use = use_of([[3.0, 0.5, 2.0], [1.0, 1.0, 1.0]], [[0.0, 4.0, 0.0], [1.0, 1.0, 1.0]], [[1, 2, 3], [4, 5, 6]])
    after = use.after_replacement(torch.tensor([[1, 2], [0, -1]]))
    assert after.reads.tolist() == [[3, 0, 0], [0, 1, 1]]
    assert after.writes.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert after.last_used.tolist() == [[1, 9, 9], [9, 5, 6]]
    assert torch.equal(use.after_replacement(torch.tensor([2])).last_used[:, 2], torch.tensor([9, 9]))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_replaced_slots_hold_the_content_and_the_rest_is_left(backend):
    values, content, indices = randn(B, N, K), randn(B, 2, K), torch.tensor([[3, 0], [-1, 4]])
    wanted = values.clone()
    wanted[0, 3], wanted[0, 0], wanted[1, 4] = content[0, 0], content[0, 1], content[1, 1]
    assert torch.equal(replace_slots(values, indices, content, backend=backend), wanted)
    poisoned = values.clone()
    poisoned[0, 3] = float("nan")
    assert torch.equal(replace_slots(poisoned, indices, content, backend=backend), wanted)
    everywhere = replace_slots(values, torch.tensor([2, -1]), content[0], backend=backend)
    assert torch.equal(everywhere[:, 2], content[0, 0].expand(B, K))
    assert torch.equal(everywhere[:, [0, 1, 3, 4]], values[:, [0, 1, 3, 4]])
    leaves = (values.requires_grad_(), content.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, c: replace_slots(v, indices, c, backend=backend), leaves)


def test_fading_is_an_exponential_of_the_tokens():
    values, rate = randn(B, N, K), torch.rand(B, N, dtype=torch.float64)
    faded = values.clone()
    for _ in range(4):
        for b in range(B):
            for i in range(N):
                faded[b, i] *= 1 - rate[b, i]
    close(fade(values, rate, 4), faded)
    close(fade(values, 0.25, 2), values * 0.5625)
    low = values.bfloat16()
    for little in (0.001, torch.full((B, N), 0.001)):
        faded = fade(low, little, 700)
        assert faded.dtype == torch.bfloat16
        torch.testing.assert_close(faded.double(), low.double() * 0.999**700, rtol=0.01, atol=0)


def test_what_is_asked_for_survives_under_least_recently_used_and_not_in_turn():
    """New facts keep arriving, four of them are read again and again, and the memory holds 16."""
    hot, slots, facts = 4, 16, 64
    codes, content = F.normalize(torch.randn(facts, 32), dim=-1), torch.randn(facts, 8)

    def recalled(choose) -> float:
        keys, values, use = torch.zeros(slots, 32), torch.zeros(slots, 8), SlotUse.none(slots)
        for fact in range(facts):
            slot = choose(use, fact)
            keys = replace_slots(keys, slot, codes[fact : fact + 1])
            values = replace_slots(values, slot, content[fact : fact + 1])
            use = use.after_replacement(slot)
            asked = codes[: min(fact + 1, hot)]
            read, lse = mk.softmax_read(asked, keys, values, scale=20.0, return_lse=True)
            use = use.after_read(mk.slot_usage(asked, keys, lse, scale=20.0), len(asked), decay=0.99)
        return float(((read - content[:hot]).norm(dim=-1) < 0.1 * content[:hot].norm(dim=-1)).float().mean())

    torch.manual_seed(0)
    assert recalled(lambda use, fact: least_recently_used(use, 1)) == 1.0
    assert recalled(lambda use, fact: least_used(use, 1)) == 1.0
    assert recalled(lambda use, fact: torch.tensor([fact % slots])) == 0.0


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\], got 0"):
        SlotUse.none(N).after_read(torch.zeros(N), 1, decay=0)
    with pytest.raises(ValueError, match=r"writes must be \[2, 5\], got \[5\]"):
        SlotUse.none(B, N).after_write(torch.zeros(N), 1)
    with pytest.raises(ValueError, match="least_used: count must be between 0 and 5, got 6"):
        least_used(SlotUse.none(N), 6)
    with pytest.raises(ValueError, match=r"indices must be \[2, 3\] or \[3\], got \[1, 3\]"):
        replace_slots(torch.zeros(B, N, K), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(B, 3, K))
    with pytest.raises(ValueError, match=r"content must be \[3, 4\], got \[2, 3, 4\]"):
        replace_slots(torch.zeros(N, K), torch.arange(3), torch.zeros(B, 3, K))
    with pytest.raises(ValueError, match=r"after_replacement: indices must be \[2, 1\] or \[1\], got \[5, 1\]"):
        SlotUse.none(B, N).after_replacement(torch.zeros(5, 1, dtype=torch.int64))
