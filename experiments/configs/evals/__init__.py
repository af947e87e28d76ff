"""Settings of evaluations, one file for each protocol."""
