"""The run folder: what a run writes, and what it is taken up from again."""
