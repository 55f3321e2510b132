"""The page of a run: plots and tables in one HTML file that loads nothing."""
