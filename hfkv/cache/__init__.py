"""hfkv's caches: transformers' contract, from layers to `KVCache`."""
