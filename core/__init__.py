"""The shared words: errors, statuses, specs, file formats, settings. Imports nothing of ours; reads nothing but the environment."""
