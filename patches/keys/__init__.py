"""Keys: how they are rotated by their positions, and the mean that is taken off them."""
