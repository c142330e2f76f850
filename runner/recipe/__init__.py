"""What one run is."""
