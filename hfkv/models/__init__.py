"""What is found out about a transformers model."""
