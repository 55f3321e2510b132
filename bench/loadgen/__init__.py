"""The load generator: when requests leave, what sends them, and what is made of the answers."""
