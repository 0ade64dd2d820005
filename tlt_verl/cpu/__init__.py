"""What makes a machine without accelerators a device like any other."""
