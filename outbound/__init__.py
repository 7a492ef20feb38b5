"""Every call that leaves this installation: addresses checked, time and size bounded, bodies signed. Knows nothing of what it carries."""
