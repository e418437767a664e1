"""Hydra configuration groups; `preset=NAME` of `selectmoe run` takes one of preset/."""
