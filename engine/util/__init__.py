"""Utilities for all packages: files, locks, signals, fonts of plots, prefetch threads, loading of C++ extensions.

Imports errors and the standard library. Never knows another package.
"""
