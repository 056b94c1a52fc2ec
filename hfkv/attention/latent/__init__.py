"""Attention to cached latents (MLA)."""
