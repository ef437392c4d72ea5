"""From a model's name to a folder that can be loaded; every file is checked before it is loaded."""
