"""The Trainer, and what a run needs around it."""
