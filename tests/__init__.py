"""Tests of the engine: a folder for each of its packages, proofs, and shared helpers (support)."""
