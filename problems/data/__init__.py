"""Images: sources, splits, augmentation and batches."""
