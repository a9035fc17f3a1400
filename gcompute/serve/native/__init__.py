"""Serving on CPU by kernels of our own in C++, compiled on the machine that they run on."""
