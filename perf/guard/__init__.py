"""Is this revision slower than the one it comes from? See GUARD.md."""
