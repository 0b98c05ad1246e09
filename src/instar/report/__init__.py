"""A run on one page: what every stage cost, and what it taught."""
