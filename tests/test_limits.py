"""Claimed: limits."""
