"""What runs have reached, in tables and pictures, and their models for other programs."""
