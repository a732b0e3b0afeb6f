"""What each method costs: pure arithmetic, one file per method, no torch."""
