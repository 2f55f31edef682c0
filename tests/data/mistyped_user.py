"""Mistakes that a type checker must find, one a line. Read by type checkers, never run: ``tests/test_typing.py``."""

import torch
from torch import Tensor

import memkernels as mk

q, k, v = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5, 4)

first: Tensor = mk.softmax_read(q, k, v, return_lse=True)  # wrong: a tuple
second: Tensor = mk.topk_read(q, k, v, 2, return_slots=True)  # wrong: a tuple
third: Tensor = mk.gated_write(v, k, q, q, return_retained=True)  # wrong: a tuple
fourth: tuple[Tensor, Tensor] = mk.additive_read(q, k, v, k)  # wrong: a tensor
fifth: Tensor = mk.memory_scan(v, k, q, q, q)  # wrong: a tuple
mk.softmax_read(q, k, v, return_lse="yes")  # wrong: a string
mk.softmax_read(q, k, v, scale="0.5")  # wrong: a string
mk.softmax_read(q, k)  # wrong: no values
mk.soft_read(q, k, v)  # wrong: no such name
mk.nn.ExternalMemories(4, 4, 4)  # wrong: no such name
mk.use_backend(3)  # wrong: not a name
