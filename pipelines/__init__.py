"""Ray Data jobs from web links to a published dataset version. Never imports torch."""
