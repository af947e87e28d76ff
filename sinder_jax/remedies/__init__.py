"""Remedies for singular defects, beside the paper's repair."""
