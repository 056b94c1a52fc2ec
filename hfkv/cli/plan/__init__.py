"""The command ``hfkv plan``."""
