"""RECFORMER (Li et al., KDD 2023): items and histories as text, read by a language model that is tuned on behaviour."""
