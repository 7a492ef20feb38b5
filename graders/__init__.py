"""Turns a completion into a grade. A grade that could not be had is an error with a code, never a number. No database, no torch."""
