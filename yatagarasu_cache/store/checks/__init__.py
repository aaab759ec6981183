"""What `check` looks at, a subject a module."""
