"""Serve versioned models on Ray Serve, and run the same models over large data with Ray Data."""
