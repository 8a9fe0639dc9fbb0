"""A config shrunk to a laptop, run on the ranks of its layout and on one process, and compared.

Imports the config, the training state and step, and what they import. Never knows the command line or tests.
"""
