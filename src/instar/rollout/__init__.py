"""Reinforcement learning: the policy answers, somebody judges, batches come out."""
