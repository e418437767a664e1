"""Proof that conversion changed nothing it should not."""
