"""Attention over keys chosen one by one."""
