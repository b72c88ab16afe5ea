"""The model, its processor, its adapters, and how they are loaded."""
