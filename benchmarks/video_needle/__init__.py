"""A synthetic long-video question task, a small video-MLLM trained on it, and the comparison dense against sparse."""
