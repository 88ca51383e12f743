"""`python -m lightning_rlvr report`: from the folder of a sweep to tables, figures and one page."""
