"""Photographs: where they lie, one photograph to an array, the stream of batches."""
