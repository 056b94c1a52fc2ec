"""The hfkv command."""
