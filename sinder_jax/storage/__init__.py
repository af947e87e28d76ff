"""Files of every kind: places, arrays with digests, states of a run, deltas."""
