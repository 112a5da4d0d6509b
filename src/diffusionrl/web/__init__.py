"""HTTP on this machine, within bounds."""
