"""Large batch inference with Ray Data, on the same models that are served."""
