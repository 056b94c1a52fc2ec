"""Kernels that write tokens and attend to them, their naive twins, and the choice among them."""
