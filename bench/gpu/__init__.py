"""What a check of the GPU half needs where there is no GPU: the real torch for CUDA, over libraries that record."""
