"""Algorithms that move data between ranks outside the forward pass: gradient buckets."""
