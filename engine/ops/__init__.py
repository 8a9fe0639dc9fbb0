"""Operations: one file per op, with a torch reference and a hand-written backward; native.py selects custom kernels.

Imports distributed (an op that communicates takes an Axis), batch and config. Never knows the model, data or how
it was launched.
"""
