"""Operations: one file an op, a torch implementation each, autograd written out; kernels chosen in native.py alone.

Imports distributed (an op that talks gets an Axis), batch, config. Never knows the model, data or how it was launched.
"""
