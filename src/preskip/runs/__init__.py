"""Runs as they lie on the disk: directory, files, attempts, and what they ran on."""
