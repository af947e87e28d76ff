"""What a long job needs: workdir, processes, signals, sinks, progress."""
