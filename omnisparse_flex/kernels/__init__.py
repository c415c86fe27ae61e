"""Triton kernels, and their fallback where one does not compile."""
