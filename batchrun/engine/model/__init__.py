"""A transformers model, loaded, hooked, checked and made faster."""
