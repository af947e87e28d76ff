"""Singular defects as seen in tokens and weights: numbers, no drawing."""
