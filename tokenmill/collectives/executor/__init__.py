"""Running one rank's program over a transport."""
