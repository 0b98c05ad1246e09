"""What a recipe will take of a machine, worked out before it is run."""
