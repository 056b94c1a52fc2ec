"""Self-test: whether the kernels of a device compute what their naive twins do."""
