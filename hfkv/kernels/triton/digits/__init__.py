"""Attention of a few queries whose numbers are digits: codes are factors of products as they are stored."""
