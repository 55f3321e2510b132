"""What a model is: its manifest, the repository it lives in, and the runtimes that run it."""
