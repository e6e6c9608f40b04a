"""Sweeps: which runs there are, what each left behind, and the table at the end; training is no part of this room."""
