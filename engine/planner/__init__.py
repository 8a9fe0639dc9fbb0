"""Counting before running: parameters and floating-point operations."""
