"""What `experiments.evaluate` needs: one module for each protocol, and the report."""
