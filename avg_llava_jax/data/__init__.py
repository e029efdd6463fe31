"""Host side, NumPy and Pillow only: from files and conversations to fixed-shape integer batches."""
