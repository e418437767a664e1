"""Everything above to tables, plots, one self-contained HTML page and the verdict."""
