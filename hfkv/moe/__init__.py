"""Sparse mixtures of experts: layers, routing, losses, statistics."""
