"""Claimed: index."""
