"""One file per model size, each with a `get_config()` that reads on its own."""
