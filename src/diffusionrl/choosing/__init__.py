"""People choose among images, on a page of this machine."""
