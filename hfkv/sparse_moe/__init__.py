"""A trainable sparse mixture-of-experts layer."""
