"""The jobs one runs from the command line: repair a model, look at its tokens."""
