"""Tightfit serves 175B-class language models on the fewest GPUs that can hold them."""

__version__ = "0.1.0"
