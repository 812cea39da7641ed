"""Training from scratch: one architecture with and without the branch, its controls, and their comparison."""
