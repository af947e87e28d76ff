"""The parts of an analysis: photographs, cached numbers, figures, verdict, report."""
