"""Claimed: segment."""
