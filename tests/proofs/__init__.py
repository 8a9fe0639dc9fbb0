"""Proofs that a layout does not change the result: equivalence, bits, resharding, traffic, and the mutations."""
