"""The Transformer: the readable part. No parallel degree is ever tested here."""
