"""Selection rules judged on real weights and text, as exact token masks."""
