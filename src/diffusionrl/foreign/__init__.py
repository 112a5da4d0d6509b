"""Code that is not ours, rewards and models of a user's own: how it is named, found and run, and what it leaves behind."""
