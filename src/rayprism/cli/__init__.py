"""The `rayprism` command. Imports click only: what a command needs is imported when it runs."""
