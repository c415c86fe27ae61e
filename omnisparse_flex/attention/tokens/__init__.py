"""Attention over keys chosen one by one: dispatch, tensor code, Triton."""
