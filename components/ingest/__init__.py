"""Rows of any source to a normalised pool and a clean holdout."""
