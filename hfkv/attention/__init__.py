"""The attention ``"hfkv"``: masks, windows, and what hands tokens to kernels."""
