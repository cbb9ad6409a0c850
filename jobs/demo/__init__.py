"""The demo: a generated web of captioned scenes, and the road from its links to a served caption."""
