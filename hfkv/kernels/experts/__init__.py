"""Products of rows with the experts that were chosen for them."""
