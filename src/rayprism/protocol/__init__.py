"""The Open Inference Protocol: codecs for JSON, binary tensors and gRPC. Knows no Ray."""
