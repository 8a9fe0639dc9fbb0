"""Operations: one file an op, a torch implementation each, autograd written out."""
