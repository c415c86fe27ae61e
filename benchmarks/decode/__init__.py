"""Decode steps over a slim cache: speed, memory and answers."""
