"""Measure it: quality and latency."""
