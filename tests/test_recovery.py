"""Being written by the helper of faulty.py and test_power.py."""
