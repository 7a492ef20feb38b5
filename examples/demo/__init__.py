"""The demo: the whole platform on this machine, a grader of its own, and a small model that learns to add."""
