"""The rows of every other arm: what the selection has to beat, and the controls."""
