"""What a machine can do, and what follows from it."""
