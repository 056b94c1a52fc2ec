"""Attention in the latent space (MLA, DeepSeek): absorbed for a few queries, expanded by stretches for many."""
