"""Operating a running fleet: the local cluster, Serve's REST API, and checks before a deploy."""
