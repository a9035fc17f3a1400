"""Measure this machine: times, what it is made of, its roofline, its memory, profiles."""
