"""Data sets: files to batches of uint8 pixels or rows, and augmentation on the device."""
