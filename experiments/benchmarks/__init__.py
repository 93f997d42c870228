"""Benchmarks: what is claimed of speed, memory and accuracy is measured here."""
