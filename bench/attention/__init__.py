"""``python -m bench attention``: attention of pretrained models on ``softmax_read``, beside that of transformers."""
