"""Readers of checkpoint files, one module per file format. `workers.checkpoint` is the door."""
