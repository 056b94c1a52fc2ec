"""`MANY`: the number of queries from which on queries count as many."""

# From so many queries on, to decode a stretch costs less than products of digits: measured on 2 cores of an EPYC with
# 16k int8 tokens, 8 kv heads of 128, 4 queries each (16 queries: 48 against 62 ms, 8: 44 against 30). On GPUs a guess.
MANY = 16
