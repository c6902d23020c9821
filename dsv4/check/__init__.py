"""Is it right: what a model is measured by, and how two paths are compared."""
