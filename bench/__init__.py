"""Load benchmarks. `src` never imports this package."""
