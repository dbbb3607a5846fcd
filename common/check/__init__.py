"""--check: the data set and the training recipe, tried before a run."""
