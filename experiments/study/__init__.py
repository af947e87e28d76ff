"""What an analysis needs: cached numbers, figures, verdict, report."""
