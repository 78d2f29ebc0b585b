"""Hugging Face families, each mapped to the one configured decoder."""
