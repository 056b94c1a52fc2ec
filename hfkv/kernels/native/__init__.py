"""Kernels in C++ for a CPU, compiled where they are used."""
