"""Data sets as Lightning data modules."""
