"""Attention of a prompt: kernels, selection, training, the cost model."""
