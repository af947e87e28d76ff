"""Measurements of time and memory; README.md holds what they gave."""
