"""The command ``hfkv eval``."""
