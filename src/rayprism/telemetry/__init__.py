"""What a fleet tells of itself: metrics, request log, traces, and what is drawn from them."""
