"""What an answer must look like, as grammars that llguidance matches token by token."""
