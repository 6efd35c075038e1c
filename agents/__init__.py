"""What agents do in a run."""
