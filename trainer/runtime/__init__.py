"""Opens packed files and classifies images with NumPy and Pillow alone, where torch is not installed."""
