"""Tasks of the plugin; lmms-eval wants a package here."""
