"""Data plane: what runs in a device's process."""
