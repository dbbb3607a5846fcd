"""What a run is and how it survives: files, processes, log, checkpoints, the loop."""
