"""The model, its processor, and what is computed with them."""
