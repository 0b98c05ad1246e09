"""What is minimised: one file a family, each a module that turns a batch into sums."""
