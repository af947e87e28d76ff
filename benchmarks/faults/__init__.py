"""Faults that happen to real jobs, made from a seed and counted by how they end."""
