"""Early exits: heads, policies, temperatures, token merging, and the network that routes each sample."""

from dynadapter.exits import attentive, combining, exit_tokens  # files find each kind of head and policy by its name

__all__ = ["attentive", "combining", "exit_tokens"]
