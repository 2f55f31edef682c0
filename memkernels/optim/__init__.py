"""Optimizers whose step costs the rows of a table that have a gradient, however many others there are.

table = torch.nn.Parameter(torch.zeros(1 << 24, 64))
optimizer = SparseAdam([table], lr=1e-3)
memkernels.gather_rows(table, slots, sparse_grad=True).sum().backward()
optimizer.step()
"""

from .sparse_adam import SparseAdam

__all__ = ["SparseAdam"]
