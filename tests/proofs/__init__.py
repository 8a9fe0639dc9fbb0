"""Proofs that a layout does not change the result: equivalence, bitwise equality, resharding, traffic, mutations."""
