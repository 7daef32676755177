"""Images: their sources and splits, augmented views, and batches on the device."""
