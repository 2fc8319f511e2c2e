"""Images as they are read, augmented, mixed and handed to a step as batches."""
