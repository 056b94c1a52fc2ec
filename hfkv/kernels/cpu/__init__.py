"""Kernels for attention on a CPU."""
