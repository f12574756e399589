"""What the operators cost, against what else a person could run."""
