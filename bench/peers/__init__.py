"""The servers that rayprism is compared with: each in an environment of its own."""
