"""Tests of processes (being written)."""
