"""A few new weights beside a frozen model: put in, trained, switched, melted in, given away."""
