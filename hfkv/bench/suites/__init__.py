"""What each suite of ``hfkv bench`` measures."""
