"""Kernels: C++ for CPUs, compiled on the machine that uses it, and Triton for GPUs; CUDA graphs."""
