"""The command line, and the drivers that put the other packages on a Ray cluster."""
