"""int3 and int2 on a GPU: rows of bits written and read, with scales of a byte."""
