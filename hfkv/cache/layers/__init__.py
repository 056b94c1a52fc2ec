"""One layer of a cache, in parts."""
