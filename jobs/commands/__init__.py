"""One module per command; ``jobs/cli.py`` imports a module only when its command runs."""
