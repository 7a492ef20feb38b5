"""Programs that show the platform at work. Run them from the root of the clone."""
