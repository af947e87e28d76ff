"""Fixtures of the tests of a run."""

from small_runs import photos, small_hub

__all__ = ["photos", "small_hub"]
