"""faiss: exact inner-product search in a flat index (built beforehand), then softmax and gather in torch."""

from __future__ import annotations

import faiss
import torch

from .eager import weighted_rows

NAME = "faiss"
DIRECTIONS = ("forward",)
QUICK = True
DEVICES = ("cpu",)


def _search(query, keys, k):
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(keys.shape[-1])
    index.add(keys.numpy())
    scaled = (query.shape[-1] ** -0.5 * query).numpy()

    def run():
        scores, indices = index.search(scaled, k)
        return torch.from_numpy(scores), torch.from_numpy(indices)

    return run


def topk_search(query, keys, k):
    search = _search(query, keys, k)
    return lambda: search()[0]


def topk_read(query, keys, values, k):
    search = _search(query, keys, k)

    def run():
        scores, indices = search()
        return weighted_rows(values, indices, torch.softmax(scores, -1))

    return run
