"""Masks as expressions of integers: evaluated, bounded over blocks, made into ``mask_mod``s."""
