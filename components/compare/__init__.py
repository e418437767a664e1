"""Many selections side by side."""
