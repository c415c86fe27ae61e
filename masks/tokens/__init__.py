"""Which keys are kept one by one: scores of keys, segments, bits."""
