"""Time and memory, read from the machine."""
