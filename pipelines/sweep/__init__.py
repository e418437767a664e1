"""Selection for many settings on one set of router data."""
