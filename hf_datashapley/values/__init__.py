"""From the scores of an update's micro-batches to the values of its samples."""
