"""Other engines, a file each. None is imported before it is asked for."""
