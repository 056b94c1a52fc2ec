"""Attention of a few queries in integers: codes are factors of tensor cores' products as they are stored."""
