"""What is asked of a cache: configs, their words, windows, units. No torch."""
