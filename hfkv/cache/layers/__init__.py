"""Layers of a cache, and the parts that they are made of."""
