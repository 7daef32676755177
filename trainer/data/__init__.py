"""Images: sources, splits, augmented views, batches on the device."""
