"""From files and tables to micro-batches."""
