"""Arithmetic on quantised tensors."""
