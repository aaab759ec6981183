"""Modules that stand in for those of other libraries, so that programs written for these run as they are."""
