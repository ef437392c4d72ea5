"""From a row's fields to the tokens of its prompt."""
