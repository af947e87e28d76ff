"""One file per model size: `giant.py` is whole, the others set what differs."""
