"""What runs next: pure, deterministic, clock passed in."""
