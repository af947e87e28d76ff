"""Figures drawn by matplotlib from plain arrays.

The numbers come from `sinder_jax.analysis`.
"""
