"""The command ``hfkv demo``."""
