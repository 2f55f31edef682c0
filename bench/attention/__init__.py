"""``python -m bench attention``: the attention of pretrained models on ``softmax_read``, beside those of transformers."""
