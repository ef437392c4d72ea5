"""From what a user names to a folder that can be loaded: every file looked at before it is read."""
