"""From the user's files and tables to micro-batches."""
