"""The jobs one runs from the command line: repair a model, watch, look, analyze."""
