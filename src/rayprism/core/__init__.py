"""Decisions only: no I/O, no clock, no environment, no Ray. Time comes in as an argument."""
