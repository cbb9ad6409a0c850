"""The inference engine and the Ray Serve application around it."""
