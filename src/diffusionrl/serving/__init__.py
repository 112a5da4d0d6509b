"""A reward behind HTTP."""
