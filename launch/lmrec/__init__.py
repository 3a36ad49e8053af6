"""LMRec's studies: its variants and seeds, beside controls and the paper's figures."""
