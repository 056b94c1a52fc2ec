"""The command ``hfkv bench``."""
