"""`python -m lightning_rlvr sweep`: from one experiment file to all its runs."""
