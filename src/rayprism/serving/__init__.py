"""Model versions as Ray Serve applications. The only place that imports ray.serve."""
