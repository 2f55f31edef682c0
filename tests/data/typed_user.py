"""What a user writes, with the types that it must have. Read by type checkers, never run: ``tests/test_typing.py``."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import memkernels as mk
from memkernels import models, nn, testing
from memkernels.nn import CacheState, MemoryState, SlotUse

q, k, v, lse = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(2, 3)
subkeys, index, some = torch.randn(2, 3, 2), torch.zeros(2, 3, 2, dtype=torch.int64), torch.randn(2, 3, 2)
pages, flag = torch.arange(2), bool(q.sum() > 0)
Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
Quadruple = tuple[Tensor, Tensor, Tensor, Tensor]

# A read is a tensor, and with its flag a tuple.
read: Tensor = mk.softmax_read(q, k, v)
read, lse = mk.softmax_read(q, k, v, scale=0.5, slot_mask=torch.ones(5), return_lse=True, backend="reference")
assert_type(mk.softmax_read(q, k, v), Tensor)
assert_type(mk.softmax_read(q, k, v, return_lse=False), Tensor)
assert_type(mk.softmax_read(q, k, v, return_lse=True), Pair)
assert_type(mk.softmax_read(q, k, v, return_lse=flag), Tensor | Pair)
assert_type(mk.softmax_read(q, k, v, scale=torch.tensor(0.5)), Tensor)
assert_type(mk.additive_read(q, k, v, torch.randn(4)), Tensor)
assert_type(mk.additive_read(q, k, v, torch.randn(4), return_lse=True), Pair)
assert_type(mk.additive_read(q, k, v, torch.randn(4), return_lse=flag), Tensor | Pair)
assert_type(mk.topk_read(q, k, v, 2), Tensor)
assert_type(mk.topk_read(q, k, v, 2, return_slots=True), Triple)
assert_type(mk.topk_read(q, k, v, 2, return_slots=flag), Tensor | Triple)
assert_type(mk.topk_read(q, k, v, 2, sink=q[..., 0], return_lse=True), Pair)
assert_type(mk.topk_read(q, k, v, 2, return_slots=True, return_lse=True), Quadruple)
assert_type(mk.softmax_read(q, k, v, sink=0.0), Tensor)
assert_type(mk.product_key_read(q, subkeys, v, 2), Tensor)
assert_type(mk.product_key_read(q, subkeys, v, 2, return_slots=True), Triple)
assert_type(mk.product_key_read(q, subkeys, v, 2, return_slots=flag), Tensor | Triple)
assert_type(mk.product_key_read(q, subkeys, v, 2, return_lse=True, sparse_grad=True), Pair)
assert_type(mk.product_key_read(q, subkeys, v, 2, value_scale=q, return_slots=True, return_lse=True), Quadruple)
assert_type(mk.sparse_read(v, index, some), Tensor)
assert_type(mk.address(q, k, gate="sigmoid"), Tensor)
assert_type(mk.slot_usage(q, k, lse), Tensor)
assert_type(mk.merge_reads([q, q], [lse, lse]), Pair)
assert_type(mk.topk_search(q, k, 2), Pair)
assert_type(mk.selected_scores(q, k, index, scale=torch.tensor(0.5)), Tensor)
assert_type(mk.selected_read(q, k, v, index), Tensor)
assert_type(mk.selected_read(q, k, v, index, return_lse=True), Pair)
assert_type(mk.selected_read(q, k, v, index, return_weights=True), Pair)
assert_type(mk.selected_read(q, k, v, index, return_weights=True, return_lse=True), Triple)
assert_type(mk.selected_read(q, k, v, index, return_lse=flag), Tensor | tuple[Tensor, ...])
assert_type(mk.indexer_search(subkeys, q, k, 2), Pair)
assert_type(mk.product_key_search(q, subkeys, 2), Pair)
assert_type(mk.paged_topk_search(q, subkeys, pages, 2, best_scores=lse, best_slots=index), Pair)
table, slots = torch.randn(9, 4), mk.ngram_slots(index, index[0], index[0], orders=(1,), heads=2)
assert_type(slots, Tensor)
assert_type(mk.gather_rows(table, index, sparse_grad=True), Tensor)
assert_type(mk.memory_gate(q, q, q[..., 0, :], table[0], table[0], eps=1e-6), Tensor)
assert_type(mk.prime_sizes(10, (1,), 2), Tensor)
assert_type(mk.softmax_read(q, k, v, slot_range=mk.causal_range(3, window=2), return_lse=True), Pair)
assert_type(mk.topk_read(q, k, v, 2, slot_range=mk.packed_range([1, 2], causal=True)), Tensor)
assert_type(mk.odd_multipliers(0, 0, 2), Tensor)

# The same for writes, their forms in place too.
new_values: Tensor = mk.gated_write(v, k, q, q, erase=0.5)
new_values, retained = mk.gated_write(v, k, q, q, erase=q, return_retained=True)
assert_type(mk.gated_write(v, k, q, q, return_retained=flag), Tensor | Pair)
assert_type(mk.gated_write_(v, k, q, q), Tensor)
assert_type(mk.gated_write_(v, k, q, q, return_retained=True), Pair)
assert_type(mk.softmax_write(v, k, q, q), Tensor)
assert_type(mk.softmax_write(v, k, q, q, return_retained=True), Pair)
assert_type(mk.softmax_write(v, k, q, q, return_retained=flag), Tensor | Pair)
assert_type(mk.softmax_write_(v, k, q, q), Tensor)
assert_type(mk.softmax_write_(v, k, q, q, return_retained=True), Pair)
assert_type(mk.slot_write(v, some, q), Tensor)
assert_type(mk.slot_write_(v, some, q), Tensor)
assert_type(mk.sparse_write(v, index, some, q), Tensor)
assert_type(mk.sparse_write_(v, index, some, q, token_mask=index[..., 0] > 0), Tensor)
assert_type(mk.memory_scan(v, k, q, q, q), Pair)
assert_type(mk.gated_scan(q, q), Tensor)
assert_type(mk.cell_scan(torch.randn(2, 3, 12), torch.randn(12, 4)), Tensor)
assert_type(mk.cache_logprobs(q, some, index, lse), Tensor)
assert_type(mk.cache_nll(q, index[..., 0], some, index, lse), Tensor)

# The modules of the package, as attributes and as imports.
assert_type(mk.__version__, str)
with mk.use_backend("reference"):
    memory = mk.nn.ExternalMemory(4, 4, 4)
assert_type(memory.values, Tensor)
assert_type(memory.read(q, memory.initial_state(2)), Tensor)
assert_type(memory.write(q, memory.initial_state(2)), MemoryState)
assert_type(nn.MultiHopRead(2, 4).forward(q, k, v), Tensor)
assert_type(nn.MultiHopRead(2, 4).forward(q, k, v, return_queries=True), Pair)
assert_type(nn.MultiHopRead(2, 4).forward(q, k, v, return_queries=flag), Tensor | Pair)
assert_type(nn.AdditiveAttention(4, 4, 4).forward(q, v), Tensor)
assert_type(nn.MemoryCell(4, 4).forward(q), Pair)
assert_type(nn.StreamingMemory(4, 4).forward(q), tuple[Tensor, MemoryState])
assert_type(nn.RetrievalMixture(torch.add, 2).forward(q, q, k, v), Tensor)
assert_type(
    nn.NeuralCache(4, 4).nll(q, q, index[..., 0], nn.NeuralCache(4, 4).initial_state(2)), tuple[Tensor, CacheState]
)
assert_type(SlotUse.none(5).after_read(torch.zeros(5), tokens=1), SlotUse)
assert_type(nn.least_used(SlotUse.none(5), 2), Tensor)
assert_type(nn.replace_slots(v, index[0, 0], q[0]), Tensor)
assert_type(nn.fade(v, 0.1), Tensor)
model = models.MemoryTransformerLM(256, d_model=16)
assert_type(model.loss(index), tuple[Tensor, MemoryState])
assert_type(model.generate(index, 2), tuple[Tensor, MemoryState])
assert_type(mk.models.MemoryRNN(4, 4, 4).initial_state(2).memory, Tensor)
assert_type(mk.models.SimilarityLM(256, 16).initial_state(2), Tensor)
assert_type(testing.check("softmax_read", quick=True), list[testing.Row])
assert_type(mk.testing.check()[0].passed, bool)
