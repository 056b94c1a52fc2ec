"""Attention in Triton, on a GPU."""
