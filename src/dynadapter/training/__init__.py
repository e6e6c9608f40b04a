"""Training with Lightning: the module, its losses and schedules, callbacks, and checkpoints."""
