"""Caches of hfkv under transformers' contract, from single layers to `KVCache`."""
