"""What scores lack of keys that were written less their mean, in Triton kernels."""
