"""Policies: from action values and preferences to actions, and how to learn them."""
