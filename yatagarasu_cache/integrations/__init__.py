"""Doors: the storages, backends and middlewares of frameworks, one module for each, and an extra likewise.

Nothing is imported here: a module imports its framework, and nobody else's.
"""
