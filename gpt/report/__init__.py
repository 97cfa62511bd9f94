"""What runs have reached, in tables and pictures."""
