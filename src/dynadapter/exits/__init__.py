"""Early exits: heads, policies, temperatures, token merging, and the network that routes each sample."""

from dynadapter.exits import combining  # with temperature and policies: files find each kind of policy by its name

__all__ = ["combining"]
