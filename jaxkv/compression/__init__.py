"""What should stay: score, budget, placement."""
