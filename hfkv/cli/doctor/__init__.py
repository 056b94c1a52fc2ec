"""The command ``hfkv doctor``."""
