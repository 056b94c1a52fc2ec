"""Experts of MoE models: how their weights are kept, and how they are run."""
