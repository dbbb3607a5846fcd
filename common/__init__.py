"""What the training scripts share. Imports nothing from `kernels` or from a script."""
