"""Calls of `generate` drawn at random: what is asked, the models it is asked of, and what came of it."""
