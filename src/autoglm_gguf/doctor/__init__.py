"""Whether this installation, machine and phone are ready, and what to do where they are not."""
